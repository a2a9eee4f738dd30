"""What ``import cmt_fast`` pulls in, and who may import whom inside the package."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import cmt_fast

PACKAGE = Path(cmt_fast.__file__).parent
OPTIONAL = ("triton", "timm", "typer", "rich", "safetensors", "torchvision", "sklearn", "matplotlib", "PIL", "onnx", "onnxscript", "onnxruntime")  # fmt: skip

# ---- a cold start -------------------------------------------------------------------------------------------------------

BLOCK = """
    import importlib.abc, sys

    class Block(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name.partition(".")[0] in OPTIONAL:
                raise ModuleNotFoundError(f"{name} is blocked", name=name)

    sys.meta_path.insert(0, Block())
"""
USE = """
    import torch
    model = cmt_fast.CMT(img_size=32, embed_dims=(8, 8, 8, 8), num_heads=(1,) * 4, depths=(1,) * 4, num_classes=3)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert model.stem_conv1.weight.grad.abs().sum() > 0
    maps = cmt_fast.CMTFeatures(model)(torch.randn(1, 3, 64, 32))
    assert len(maps) == 4
    assert "reference" in str(cmt_fast.explain(cmt_fast.functional.lpu, torch.randn(1, 4, 4, 8), torch.nn.Conv2d(8, 8, 3, padding=1, groups=8), backend="reference"))
"""


def run(*parts):
    code = f"OPTIONAL = {OPTIONAL!r}\n" + "\n".join(textwrap.dedent(part) for part in parts)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_works_without_any_optional_dependency():
    run(BLOCK, "import cmt_fast", USE)


def test_import_loads_nothing_optional_and_touches_no_device():
    run(
        """
        import sys, torch
        of_torch = set(sys.modules)
        import cmt_fast
        loaded = {name.partition(".")[0] for name in set(sys.modules) - of_torch}
        assert not loaded & set(OPTIONAL), loaded & set(OPTIONAL)
        assert loaded <= {"cmt_fast", "torch", "numpy"} | set(sys.stdlib_module_names), loaded
        assert not torch.cuda.is_initialized()
        assert not torch.ops.loaded_libraries, torch.ops.loaded_libraries
        """,
        USE,
        """
        loaded = {name.partition(".")[0] for name in sys.modules}
        assert not loaded & set(OPTIONAL), loaded & set(OPTIONAL)
        """,
    )


def test_command_line_needs_only_its_extra():
    run("OPTIONAL = set(OPTIONAL) - {'typer', 'rich', 'PIL'}", BLOCK, "import cmt_fast.cli.app")


def test_missing_safetensors_says_what_to_install(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\0" * 32)
    for call in (
        f"cmt_fast.load_checkpoint(model, {str(tmp_path / 'x.safetensors')!r})",
        f"cmt_fast.save_checkpoint(model, {str(tmp_path / 'y.safetensors')!r})",
    ):
        run(
            BLOCK,
            "import cmt_fast",
            USE.partition("model(torch")[0],
            f"try: {call}\n"
            "except ImportError as error: assert \"pip install 'cmt-fast[checkpoints]'\" in str(error), error\n"
            "else: raise SystemExit('no error')",
        )


# ---- who imports whom ---------------------------------------------------------------------------------------------------

# The parts of the package, each with the parts it may import beside itself (DESIGN: cli, training, detection -> models ->
# modules -> functional -> ops). A new part gets a line here, and thereby a place in the order.
OPS = {"backend", "_native"}
MODELS = {"_version", "modules", "functional", "ops", "backend"}
USERS = MODELS | {"models", "data", "inference", "testing"}
MAY_IMPORT = {
    "_version": set(),
    "_native": {"_version"},
    "backend": {"_native"},
    "ops": OPS,
    "functional": {"ops"},
    "modules": {"functional", "ops"},
    "models": MODELS,
    "data": set(),
    "inference": MODELS | {"models"},
    "testing": (USERS | OPS) - {"data"},
    "tuning": USERS | OPS,
    "training": USERS,
    "detection": USERS | {"training"},
    "cli": USERS | {"training", "detection", "tuning"},
    "__main__": {"cli"},
    "__init__": {*MODELS, "models", "inference"},
}
# What of an operation the model side may see: never a kernel, its launcher or its autograd Function.
OPS_FOR_MODELS = {"api", "relative_pos", "layout", "checks", "autocast"}


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path):
    return tuple(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path):
    """(module as a tuple of names, whether it is imported together with the file) of each import in it."""
    tree = ast.parse(path.read_text())
    inside = {node for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            names = [node.module]
            for alias in node.names:  # "from cmt_fast.ops import x" may name a module
                if (PACKAGE.parent / Path(*node.module.split("."), alias.name)).with_suffix(".py").exists():
                    names.append(f"{node.module}.{alias.name}")
        else:
            continue
        for name in names:
            yield tuple(name.split(".")), node not in inside


def own_imports(path):
    for name, _ in imports(path):
        if name[0] == "cmt_fast" and len(name) > 1:
            yield name[1:]


@pytest.mark.parametrize("path", sources(), ids=lambda path: ".".join(dotted(path)))
def test_direction(path):
    part, *rest = dotted(path)
    assert part in MAY_IMPORT, f"{part} is a new part of the package: give it its line in MAY_IMPORT"
    for name in own_imports(path):
        assert name[0] == part or name[0] in MAY_IMPORT[part], f"{part} must not import {'.'.join(name)}"
        if part in ("functional", "modules", "models") and name[0] == "ops":
            assert name[-1] in OPS_FOR_MODELS, f"{part} must not import {'.'.join(name)}"
    if part == "ops" and len(rest) == 2:
        check_operation(path, *rest)


def check_operation(path, operation, file):
    names = [name for name in own_imports(path) if name[0] == "ops"]
    others = [name for name in own_imports(path) if name[0] != "ops"]
    if file in ("reference", "schema"):  # the mathematics and the signatures stand alone, on torch
        assert not others, f"{file} must not import {others}"
        allowed = {"reference", "layout", "relative_pos"} if file == "reference" else {"register"}
        assert {name[-1] for name in names} <= allowed, f"{file} must not import {names}"
    elif file != "api":  # nothing that runs a kernel may lean on the reference, whose errors it would share
        assert not [name for name in names if name[-1] == "reference"], f"{file} must not import a reference"
    if file == "triton_kernels":
        assert {name[1] for name in names} <= {"_triton"} and not others, f"triton_kernels must not import {names}"
    for name in names:
        foreign = len(name) > 2 and name[1] not in (operation, "_triton")
        assert not (foreign and name[2].startswith("triton")), f"{operation} must not import another's {name}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: ".".join(dotted(path)))
def test_optional_dependencies_are_imported_late(path):
    """At the head of a file only where the whole file is for that dependency, and nobody imports it at its head."""
    parts = dotted(path)
    at_head = {name[0] for name, eager in imports(path) if eager} & set(OPTIONAL)
    if parts[0] == "cli":
        at_head -= {"typer", "rich"}
    if parts[0] in ("data", "training"):  # for the command line, whose extra has Pillow
        at_head -= {"PIL"}
    if parts == ("models", "timm_models"):
        at_head -= {"timm"}
    if parts[0] == "ops" and (parts[-1].startswith("triton") or "_triton" in parts):
        at_head -= {"triton"}
    assert not at_head, f"import {at_head} inside the functions that need it"
    if parts[0] != "cli":
        heads = {name[1:] for name, eager in imports(path) if eager and name[0] == "cmt_fast"}
        late = {name for name in heads if name[:1] == ("cli",) or name == ("models", "timm_models")}
        if parts[0] == "ops" and parts[-1].startswith("triton"):
            heads = set()
        late |= {name for name in heads if name[-1:] and name[-1].startswith("triton")}
        assert parts[0] == "__main__" or not late, f"import {late} inside the functions that need it"
