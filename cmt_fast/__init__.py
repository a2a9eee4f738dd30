"""cmt_fast: the drop-in CMT vision backbone whose wall-clock time matches its FLOP count."""

from cmt_fast import functional
from cmt_fast._version import __version__
from cmt_fast.backend import BackendError, explain, get_backend, set_backend, use_backend
from cmt_fast.inference.optimize import OptimizedModel, optimize
from cmt_fast.models.accelerate import accelerate
from cmt_fast.models.checkpoint import CheckpointError, load_checkpoint, load_model, read_checkpoint, save_checkpoint
from cmt_fast.models.cmt import CMT
from cmt_fast.models.create import cmt_b, cmt_s, cmt_ti, cmt_xs
from cmt_fast.models.create import create as create_model
from cmt_fast.models.features import CMTFeatures
from cmt_fast.models.timm_hook import register_with_timm

__all__ = [
    "CMT",
    "BackendError",
    "CMTFeatures",
    "CheckpointError",
    "OptimizedModel",
    "__version__",
    "accelerate",
    "cmt_b",
    "cmt_s",
    "cmt_ti",
    "cmt_xs",
    "create_model",
    "explain",
    "functional",
    "get_backend",
    "load_checkpoint",
    "load_model",
    "optimize",
    "read_checkpoint",
    "save_checkpoint",
    "set_backend",
    "use_backend",
]

register_with_timm()
del register_with_timm
