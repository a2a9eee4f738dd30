"""cmt_fast: the drop-in CMT vision backbone whose wall-clock time matches its FLOP count."""

from cmt_fast import functional
from cmt_fast._version import __version__
from cmt_fast.backend import BackendError, explain, get_backend, set_backend, use_backend
from cmt_fast.models.cmt import CMT
from cmt_fast.models.features import CMTFeatures

__all__ = [
    "CMT",
    "BackendError",
    "CMTFeatures",
    "__version__",
    "explain",
    "functional",
    "get_backend",
    "set_backend",
    "use_backend",
]
