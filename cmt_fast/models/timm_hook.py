"""Registering with timm without importing it: at once if it is there, else right after somebody imports it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_timm() -> None:
    """Make ``timm.create_model("cmt_s")`` work, whichever of timm and cmt_fast is imported first."""
    if "timm" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterTimm())


def _register() -> None:
    try:
        import cmt_fast.models.timm_models  # noqa: F401
    except Exception as error:  # importing timm must work with any version of it
        warnings.warn(
            f"cmt_fast could not register its models with this timm (1.0.9 or later is needed): {error}", stacklevel=2
        )


class _AfterTimm(MetaPathFinder):
    """Lets the other finders find timm, and has its loader register the models once timm has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                break
        else:
            return None
        loader = spec.loader
        if loader is not None and hasattr(loader, "exec_module"):

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module  # the class's again
                loader.exec_module(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
