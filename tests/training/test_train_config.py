"""Every setting that can be wrong is refused before anything is read."""

import pytest

from cmt_fast.training.config import TrainConfig


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model="cmt_x"), "unknown model 'cmt_x'; expected one of cmt_ti"),
        (dict(epochs=0), "epochs must be positive, got 0"),
        (dict(lr=-1.0), "lr must be positive"),
        (dict(lr=1e-6), r"min_lr must be at most lr \(1e-06\), got 1e-05"),
        (dict(batch_size=1), "batch_size must be at least 2"),
        (dict(batch_size=7, mixup=0.8), "batch_size must be even, got 7"),
        (dict(weight_decay=-0.1), "weight_decay must be at least 0"),
        (dict(drop_path=1.0), r"drop_path must be in \[0, 1\), got 1.0"),
        (dict(ema_decay=1.5), "ema_decay must be in"),
        (dict(epochs=3, warmup_epochs=3), r"warmup_epochs must be less than epochs \(3\)"),
        (dict(amp="fp8"), "amp must be auto, off, bf16 or fp16, got fp8"),
        (dict(residual="bf16"), "residual must be full or low, got bf16"),
        (dict(amp="fp16", device="cpu"), "amp fp16 needs a GPU"),
        (dict(model="cmt_digits", pretrained=True), "no published weights of cmt_digits"),
        (dict(pretrained=True, init_from="x.pth"), "choose one"),
        (dict(init_from="nothing.pth"), "no file nothing.pth"),
        (dict(device="tpu9"), "device must be auto, cpu, cuda or cuda:N, got 'tpu9'"),
        (dict(device="cuda:99"), "no device cuda:99"),
        (dict(backend="fast"), "backend must be one of 'auto'"),
        (dict(img_size=8), "both sides must be at least"),
        (dict(model_args=dict(embed_dims=[8, 16, 32])), "embed_dims must hold four positive integers"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        TrainConfig("nowhere", **changes).check()


def test_defaults_are_right():
    TrainConfig("digits", model="cmt_digits").check()
    TrainConfig("nowhere").check()


def test_survives_a_dict():
    config = TrainConfig("digits", model_args={"depths": [1, 1, 1, 1]}, mixup=0.8)
    assert TrainConfig.from_dict(config.as_dict()) == config


def test_unknown_saved_settings():
    with pytest.raises(ValueError, match="does not know: new_thing"):
        TrainConfig.from_dict({"data": "digits", "new_thing": 1})


def test_image_sizes():
    assert TrainConfig("digits", model="cmt_digits").constructor_args()["img_size"] == 32
    assert TrainConfig("folder", model="cmt_ti").constructor_args()["img_size"] == 160
    assert TrainConfig("folder", model="cmt_ti", img_size=96).constructor_args()["img_size"] == 96
