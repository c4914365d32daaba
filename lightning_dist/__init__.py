"""Knowledge distillation from stronger teachers (DIST) for PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # These imports are for editors and mypy, which do not follow __getattr__.
    from lightning_dist.cache import CachedTeacher
    from lightning_dist.callback import DistillationCallback
    from lightning_dist.files.card_files import load_initial_weights
    from lightning_dist.losses import DISTLoss, KDLoss
    from lightning_dist.module import DistillModule
    from lightning_dist.teacher import Teacher
    from lightning_dist.terms import Term
    from lightning_dist.training import StudentEMA, WeightSchedule

__version__ = "0.1.0"

__all__ = [
    "CachedTeacher",
    "DISTLoss",
    "DistillModule",
    "DistillationCallback",
    "KDLoss",
    "StudentEMA",
    "Teacher",
    "Term",
    "WeightSchedule",
    "load_initial_weights",
]

_HOMES = {
    "CachedTeacher": "cache",
    "DISTLoss": "losses",
    "DistillModule": "module",
    "DistillationCallback": "callback",
    "KDLoss": "losses",
    "StudentEMA": "training",
    "Teacher": "teacher",
    "Term": "terms",
    "WeightSchedule": "training",
    "load_initial_weights": "files.card_files",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562), so that the command starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # so that the next use does not call __getattr__
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
