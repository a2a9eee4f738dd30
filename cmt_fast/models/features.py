"""CMT as a backbone: four feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cmt_fast.models.cmt import CMT, feature_indices


class FeatureInfo:
    """Channels and strides of the maps that a :class:`CMTFeatures` returns, with the accessors of timm's class.

    Each accessor gives one value a returned map, or, with ``idx``, those of the stages named.
    """

    def __init__(self, info: Sequence[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self.info = [dict(entry, index=i) for i, entry in enumerate(info)]
        self.out_indices = tuple(out_indices)

    def _get(self, key: str, idx: int | Sequence[int] | None) -> Any:
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[i][key] for i in (self.out_indices if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """Channels of the maps."""
        return self._get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Strides of the maps against the input: 4, 8, 16, 32."""
        return self._get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """Names of the modules that make the maps."""
        return self._get("module", idx)

    def get_dicts(self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None) -> Any:
        """Everything known of the maps, or only ``keys``."""
        entries = [self.info[i] for i in (self.out_indices if idx is None else [idx] if isinstance(idx, int) else idx)]
        entries = entries if keys is None else [{k: entry[k] for k in keys} for entry in entries]
        return entries[0] if isinstance(idx, int) else entries

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.info[index]

    def __len__(self) -> int:
        return len(self.info)


class CMTFeatures(nn.Module):
    """A CMT without its head that returns the maps of the stages ``out_indices``.

    Stages after the last one wanted are removed. The CMT is ``model``, as in timm's wrapper.

    Args:
        model: the model to take apart; it is changed.
        out_indices: stages 0 to 3 (negative counts from the end), or the number of last stages.
    """

    def __init__(self, model: CMT, out_indices: Sequence[int] | int = (0, 1, 2, 3)) -> None:
        super().__init__()
        self.out_indices = tuple(feature_indices(out_indices, len(model.stages)))
        self.feature_info = FeatureInfo(model.feature_info, self.out_indices)
        model.prune_intermediate_layers(self.out_indices)
        self.model = model

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See :meth:`cmt_fast.CMT.set_grad_checkpointing`."""
        self.model.set_grad_checkpointing(enable)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> one (B, C, H / stride, W / stride) map a stage, channels_last in memory."""
        maps = self.model.forward_intermediates(x, self.out_indices, stop_early=True, intermediates_only=True)
        assert isinstance(maps, list)
        return maps
