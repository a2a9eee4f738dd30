"""``cmt-fast train``: what it accepts, says and leaves behind."""

import pytest
import torch

from cmt_fast.cli.train import TrainingProgress
from cmt_fast.models.checkpoint import load_model

pytestmark = pytest.mark.needs("timm", "torchvision")

SMALL = ["--embed-dims", "8,8,16,16", "--depths", "1,1,1,1", "--num-heads", "1,1,2,2", "--batch-size", "128", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run"


def test_trains_and_tells(cmt_fast, output):
    code, out, err = cmt_fast("train", "digits", "--epochs", 1, *SMALL, "--output", output)
    assert code == 0, err
    assert "1347 images to train on, 450 held out, 10 classes" in out
    assert "epoch   1/1" in out and "accuracy on held-out images" in out
    assert f"cmt-fast predict IMAGE --checkpoint {output}/best.pth" in out
    assert load_model(output / "best.pth").embed_dims == (8, 8, 16, 16)


def test_every_option_of_the_recipe(cmt_fast, output):
    options = "--mixup 0.8 --cutmix 1 --ema --ema-decay 0.9 --amp bf16 --residual low --channels-last --drop-path 0.2 --clip-grad 1 --seed 3 --label-smoothing 0 --weight-decay 0.1 --lr 0.001 --min-lr 0 --warmup-epochs 0.5 --workers 0 --backend reference --img-size 40"  # fmt: skip
    code, _, err = cmt_fast("train", "digits", "--epochs", 1, *SMALL, *options.split(), "--output", output)
    assert code == 0, err
    saved = torch.load(output / "last.pth", weights_only=True)
    config = saved["train"]["config"]
    for name, value in dict(mixup=0.8, cutmix=1, ema=True, ema_decay=0.9, amp="bf16", residual="low", channels_last=True, drop_path=0.2, clip_grad=1, seed=3, label_smoothing=0, weight_decay=0.1, lr=0.001, min_lr=0, warmup_epochs=0.5, backend="reference", img_size=40).items():  # fmt: skip
        assert config[name] == value, name
    assert "model_ema" in saved
    assert load_model(output / "best.pth").img_size == (40, 40)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "cmt-fast train digits"),
        (["nowhere"], "no folder nowhere; training needs DATA/train/CLASS/image.jpg"),
        (
            ["digits", "--model", "resnet50"],
            "unknown model 'resnet50'; expected one of cmt_ti, cmt_xs, cmt_s, cmt_b, cmt_digits",
        ),
        (["digits", "--epochs", "0"], "epochs must be positive, got 0"),
        (["digits", "--epochs", "two"], "Invalid value for '--epochs'"),
        (["digits", "--embed-dims", "8,16"], "--embed-dims takes four whole numbers"),
        (["digits", "--depths", "1,1,x,1"], "got '1,1,x,1'"),
        (["digits", "--batch-size", "2000"], "batch_size must be at most the 1347 training images"),
        (["digits", "--mixup", "0.8", "--batch-size", "63"], "batch_size must be even"),
        (["digits", "--sr-ratios", "8,4,2,1", "--img-size", "16"], "both sides must be at least"),
        (["digits", "--device", "cuda:77"], "no device cuda:77"),
        (["digits", "--backend", "fastest"], "backend must be one of"),
        (["digits", "--init-from", "gone.pth"], "no file gone.pth"),
        (["digits", "--pretrained"], "no published weights of cmt_digits"),
        (["--resume", "gone.pth"], "gone.pth"),
        (["digits", "--no-such-option"], "No such option"),
    ],
)
def test_mistakes_exit_2_before_anything_is_written(cmt_fast, output, arguments, message):
    code, _, err = cmt_fast("train", *arguments, "--output", output)
    assert code == 2
    assert message in err.replace("\n", " ").replace("  ", " "), err
    assert not output.exists() and "Traceback" not in err


def test_interrupt_tells_how_to_resume(cmt_fast, output, monkeypatch):
    stepped = TrainingProgress.stepped

    def press_ctrl_c(self, epoch, step, result):
        stepped(self, epoch, step, result)
        if epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TrainingProgress, "stepped", press_ctrl_c)
        code, _, err = cmt_fast("train", "digits", "--epochs", 2, *SMALL, "--output", output)
    assert code == 130
    assert f"cmt-fast train --resume {output}/last.pth" in err

    code, _, err = cmt_fast("train", "--resume", output / "last.pth", "--lr", "0.5")
    assert code == 2 and "--lr 0.5 contradicts" in err
    code, out, err = cmt_fast("train", "--resume", output / "last.pth", "--workers", "0")
    assert code == 0, err
    assert "epoch   2/2" in out and "epoch   1/2" not in out


def test_interrupt_before_the_first_epoch(cmt_fast, output, monkeypatch):
    def press_ctrl_c(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingProgress, "stepped", press_ctrl_c)
    code, _, err = cmt_fast("train", "digits", "--epochs", 1, *SMALL, "--output", output)
    assert code == 130 and "nothing was saved" in err


def test_second_run_into_the_same_folder(cmt_fast, output):
    output.mkdir()
    (output / "last.pth").write_bytes(b"")
    code, _, err = cmt_fast("train", "digits", "--epochs", 1, *SMALL, "--output", output)
    assert code == 2 and "already holds a run" in err


def test_help_teaches(cmt_fast):
    code, out, _ = cmt_fast("train", "--help")
    assert code == 0
    for text in ("cmt-fast train digits", "torchrun", "--resume", "default: 300; 20 for digits"):
        assert text in out
