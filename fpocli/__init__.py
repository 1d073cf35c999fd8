"""Feature-level Preference Optimization from a cached reference.

    fpocli.cache(fpocli.CacheConfig(model="gemma-2-2b", layer=[25]))
    fpocli.train(fpocli.TrainConfig(cache="ref.zarr"))

The command line calls the same functions. Nothing heavy is loaded before one is used.
"""

from importlib import import_module
from typing import Any

from fpocli.config import CacheConfig, CompareConfig, EvalConfig, InspectConfig, TrainConfig
from fpocli.system.errors import UserError

_HOME = {
    "cache": "fpocli.caching.cache",
    "train": "fpocli.training.train",
    "evaluate": "fpocli.evaluation.evaluate",
    "compare": "fpocli.comparison.compare",
    "inspect": "fpocli.report.inspect",
    "Store": "fpocli.store.reader",
}

__all__ = [
    "CacheConfig",
    "CompareConfig",
    "EvalConfig",
    "InspectConfig",
    "TrainConfig",
    "UserError",
    *_HOME,
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
