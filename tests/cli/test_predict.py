"""``cmt-fast predict``: from files and folders, with what a checkpoint holds."""

import csv
import json

import pytest
import torch
from PIL import Image

from cmt_fast.cli import weights
from cmt_fast.data.digits import digits_preprocess, load_digit_images
from cmt_fast.data.preprocess import Preprocess
from cmt_fast.inference import pack, save_packed
from cmt_fast.models.checkpoint import save_checkpoint
from cmt_fast.models.cmt import CMT
from cmt_fast.models.features import CMTFeatures

pytestmark = pytest.mark.needs("timm", "torchvision")

LAYOUT = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), stem_channel=8, fc_dim=32, img_size=32)  # fmt: skip
DIGITS = [f"digit {i}" for i in range(10)]


def small_model(**changes):
    torch.manual_seed(0)
    return CMT(**{**LAYOUT, "sr_ratios": (2, 1, 1, 1), **changes}).eval()


@pytest.fixture
def checkpoint(tmp_path):
    """An untrained model that reads digits: probabilities are what counts here, not whether they are right."""
    model = small_model(in_chans=1, num_classes=10)
    preprocess = digits_preprocess(32).as_dict()
    return save_checkpoint(model, tmp_path / "digits.pth", class_names=DIGITS, preprocess=preprocess), model


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    images, _ = load_digit_images(held_out=True)
    for name, image in zip(("a.png", "b.png", "more/c.png"), images):
        image.save(root / name)
    return root


def expected(model, paths):
    transform = digits_preprocess(32).evaluation()
    with torch.no_grad():
        return model(torch.stack([transform(Image.open(path)) for path in paths])).softmax(1)


def test_folder_and_file_in_batches(cmt_fast, checkpoint, folder, tmp_path):
    path, model = checkpoint
    result = tmp_path / "result.json"
    code, out, err = cmt_fast("predict", folder, folder / "a.png", "--checkpoint", path, "-k", 3, "-b", 2, "-o", result)
    assert code == 0, err
    entries = json.loads(result.read_text())
    files = [folder / "a.png", folder / "b.png", folder / "more/c.png", folder / "a.png"]
    assert [entry["image"] for entry in entries] == [str(file) for file in files]
    for entry, p in zip(entries, expected(model, files)):
        top = p.topk(3)
        assert [c["class"] for c in entry["classes"]] == [DIGITS[i] for i in top.indices]
        assert torch.allclose(torch.tensor([c["probability"] for c in entry["classes"]]), top.values, atol=1e-6)
    assert "digit " in out and "█" in out and "4 images in" in out


def test_csv(cmt_fast, checkpoint, folder, tmp_path):
    (folder / "z.png").write_bytes(b"no image")
    result = tmp_path / "result.csv"
    code, _, _ = cmt_fast("predict", folder, "--checkpoint", checkpoint[0], "-k", 2, "-o", result)
    rows = list(csv.DictReader(result.open()))
    assert code == 0 and len(rows) == 7
    assert [row["rank"] for row in rows] == ["1", "2"] * 3 + ["0"]
    assert float(rows[0]["probability"]) >= float(rows[1]["probability"])
    assert "z.png" in rows[-1]["error"]


def test_unreadable_images_are_counted(cmt_fast, checkpoint, folder):
    (folder / "b.png").write_bytes(b"no image")
    code, out, err = cmt_fast("predict", folder, "--checkpoint", checkpoint[0])
    assert code == 0
    assert "not read" in err and "b.png" in err and "2 images in" in out and "1 not read" in out


def test_nothing_readable_exits_1(cmt_fast, checkpoint, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"")
    code, out, _ = cmt_fast("predict", broken, "--checkpoint", checkpoint[0])
    assert code == 1 and "0 images" in out


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_image(cmt_fast, tmp_path, mode, channels):
    preprocess = digits_preprocess(32) if channels == 1 else Preprocess(img_size=(32, 32))
    model = save_checkpoint(small_model(in_chans=channels, num_classes=4), tmp_path / "m.pth", preprocess=preprocess.as_dict())  # fmt: skip
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (50, 40)).save(path)
    code, out, err = cmt_fast("predict", path, "--checkpoint", model)
    assert code == 0, err
    assert "class 0" in out  # no names saved, four classes


def test_other_size(cmt_fast, checkpoint, folder):
    code, _, err = cmt_fast("predict", folder, "--checkpoint", checkpoint[0], "--img-size", 48)
    assert code == 0, err


def test_processes_read_the_same(cmt_fast, checkpoint, folder, tmp_path):
    """In the order of the files, unreadable ones in their places, whoever reads them."""
    (folder / "b.png").write_bytes(b"no image")
    written = []
    for workers, batch_size in ((0, 32), (2, 1), (2, 2)):
        result = tmp_path / f"{workers}-{batch_size}.json"
        arguments = ("--workers", workers, "-b", batch_size, "-o", result)
        code, out, err = cmt_fast("predict", folder, folder / "a.png", "--checkpoint", checkpoint[0], *arguments)
        assert code == 0, err
        assert ("2 processes beside it" if workers else "in turn with it") in out
        written.append(json.loads(result.read_text()))
    for entries in written:
        assert ["error" in entry for entry in entries] == [False, True, False, False]
        assert [entry["image"] for entry in entries] == [entry["image"] for entry in written[0]]
        for entry, first in zip(entries, written[0]):
            assert [c["class"] for c in entry.get("classes", [])] == [c["class"] for c in first.get("classes", [])]


def test_dtype(cmt_fast, checkpoint, folder):
    code, out, err = cmt_fast("predict", folder, "--checkpoint", checkpoint[0], "--dtype", "bfloat16")
    assert code == 0, err
    assert "the model alone" in out and "(bfloat16, " in out


def test_packed_file(cmt_fast, checkpoint, folder, tmp_path):
    """It has the class names and the preprocessing; without them, those of a checkpoint without them."""
    packed = save_packed(
        pack(checkpoint[1]), tmp_path / "p.safetensors", class_names=DIGITS, preprocess=digits_preprocess(32).as_dict()
    )
    results = []
    for path in (checkpoint[0], packed):
        result = tmp_path / "result.csv"
        code, _, err = cmt_fast("predict", folder, "--checkpoint", path, "-o", result)
        assert code == 0, err
        results.append(result.read_text())
    assert results[0] == results[1] and "digit" in results[0]
    bare = save_packed(pack(small_model(num_classes=4)), tmp_path / "bare.safetensors")
    code, out, err = cmt_fast("predict", folder, "--checkpoint", bare)
    assert code == 0 and "class 0" in out, err


def test_feature_maps_have_no_classes(cmt_fast, folder, tmp_path):
    packed = save_packed(pack(CMTFeatures(small_model())), tmp_path / "maps.safetensors")
    code, _, err = cmt_fast("predict", folder, "--checkpoint", packed)
    assert code == 2 and "no classes to name" in err


def test_many_images_are_shortened(cmt_fast, checkpoint, tmp_path):
    image = load_digit_images(held_out=True)[0][0]
    for i in range(45):
        image.save(tmp_path / f"{i:02}.png")
    code, out, _ = cmt_fast("predict", tmp_path, "--checkpoint", checkpoint[0])
    assert code == 0 and "39.png" in out and "40.png" not in out and "and 5 more images; --output" in out


def test_weights_without_layout(cmt_fast, tmp_path, folder, monkeypatch):
    """The original's files hold only weights: --model says what they are."""
    model = small_model(num_classes=7)
    torch.save({"model": model.state_dict()}, tmp_path / "original.pth")
    monkeypatch.setattr(weights, "create", lambda name, **kwargs: small_model(**{**kwargs, "img_size": 32}))
    code, out, err = cmt_fast("predict", folder, "--checkpoint", tmp_path / "original.pth", "--model", "cmt_s")
    assert code == 0, err
    assert "class 0" in out


def test_published_weights(cmt_fast, folder, monkeypatch):
    monkeypatch.setattr(weights, "create", lambda name, pretrained: small_model(num_classes=1000))
    monkeypatch.setattr(weights, "imagenet_class_names", lambda: [f"thing {i}" for i in range(1000)])
    code, out, err = cmt_fast("predict", folder, "--model", "cmt_s", "--pretrained")
    assert code == 0, err
    assert "thing " in out


def test_imagenet_names():
    from cmt_fast.data.class_names import imagenet_class_names

    names = imagenet_class_names()
    assert len(names) == 1000 and names[0] == "tench" and names[208] == "Labrador retriever"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["IMAGE"], "which weights? Give --checkpoint FILE"),
        (["IMAGE", "--model", "cmt_s"], "which weights?"),
        (["IMAGE", "--model", "vit"], "unknown model 'vit'; expected one of cmt_ti"),
        (["IMAGE", "--checkpoint", "gone.pth"], "gone.pth"),
        (["IMAGE", "--checkpoint", "CHECKPOINT", "--pretrained"], "choose one"),
        (["IMAGE", "--checkpoint", "BARE"], "does not say which model it holds: give --model"),
        (["IMAGE", "--checkpoint", "CHECKPOINT", "--model", "cmt_s"], "but --model says cmt_s: leave --model out"),
        (["IMAGE", "--checkpoint", "IMAGE"], "IMAGE"),
        (["gone.png", "--checkpoint", "CHECKPOINT"], "no file or folder gone.png"),
        (["EMPTY", "--checkpoint", "CHECKPOINT"], "holds no image"),
        (["IMAGE", "--checkpoint", "CHECKPOINT", "-o", "result.txt"], "--output must end in .json or .csv"),
        (
            ["IMAGE", "--checkpoint", "CHECKPOINT", "--dtype", "fp8"],
            "--dtype must be float32, bfloat16, float16 or auto",
        ),
        (["IMAGE", "--checkpoint", "CHECKPOINT", "--amp", "bf16"], "give --dtype bfloat16"),
        (["IMAGE", "--checkpoint", "CHECKPOINT", "--device", "tpu"], "device must be auto, cpu, cuda or cuda:N"),
        (["IMAGE", "--checkpoint", "CHECKPOINT", "-k", "0"], "Invalid value for '--top-k'"),
        (["IMAGE", "--checkpoint", "CHECKPOINT", "--img-size", "3"], "both sides must be at least"),
        (["IMAGE", "--checkpoint", "NO_PREPROCESS"], "does not record its preprocessing"),
        ([], "Missing argument"),
    ],
)
def test_mistakes_exit_2(cmt_fast, checkpoint, folder, tmp_path, arguments, message):
    files = {"IMAGE": folder / "a.png", "CHECKPOINT": checkpoint[0], "EMPTY": tmp_path / "empty", "BARE": tmp_path / "bare.pth", "NO_PREPROCESS": tmp_path / "grey.pth"}  # fmt: skip
    files["EMPTY"].mkdir()
    torch.save(checkpoint[1].state_dict(), files["BARE"])
    save_checkpoint(checkpoint[1], files["NO_PREPROCESS"])
    message = str(files.get(message, message))
    code, _, err = cmt_fast("predict", *(files.get(a, a) for a in arguments))
    assert code == 2
    assert message in err.replace("\n", " "), err
    assert "Traceback" not in err
