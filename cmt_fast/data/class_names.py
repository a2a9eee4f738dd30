"""Names of the ImageNet classes."""

from __future__ import annotations


def imagenet_class_names() -> list[str]:
    """The 1000 classes of ImageNet-1K, in the order of the published models' outputs.

    Raises:
        ImportError: without torchvision, whose list this is.
    """
    try:
        from torchvision.models import ResNet50_Weights
    except ImportError as error:
        raise ImportError("the names of the ImageNet classes need torchvision: pip install torchvision") from error

    return list(ResNet50_Weights.DEFAULT.meta["categories"])
