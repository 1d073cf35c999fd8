"""Feature-level Preference Optimization from a cached reference.

    fpocli.cache(fpocli.CacheConfig(model="gemma-2-2b", layer=[25]))
    fpocli.train(fpocli.TrainConfig(cache="ref.zarr"))

The public API, which the command line uses as well:

    cache(CacheConfig)        runs the reference and its SAEs, writes a store, returns it
    preview(CacheConfig)      shows the first pairs of the data as the model will see them
    train(TrainConfig)        trains a policy against a store, returns the folder of the model
    evaluate(EvalConfig)      measures a policy on a store's pairs, returns the content of eval.json
    compare(CompareConfig)    runs a grid of methods, returns a record for each run
    inspect(InspectConfig)    describes a store, returns what it prints
    saes(SaesConfig)          lists the pre-trained SAEs of a model, returns the list
    doctor(DoctorConfig)      checks this machine, returns what it prints
    report_runs(ReportConfig) writes an HTML page about runs, returns its numbers
    export(ExportConfig)      writes the card of a model or store, pushes it; returns the folder
    contrast(ContrastConfig)  which features separate chosen from rejected responses
    find(FindConfig)          the features of a kind of text, as a weights file
    show(ShowConfig)          one feature of a store: frequency, pairs, tokens in context
    diff(DiffConfig)          what training did to the model, feature by feature
    steer(SteerConfig)        samples with features added or ablated
    Store.open(path)          opens a store for reading
    UserError                 what all of them raise for a mistake; it has a message and a hint

A config is a frozen dataclass with one field for each flag of its command. Nothing heavy is
imported before one of the functions is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fpocli.config import (
    CacheConfig,
    CompareConfig,
    ContrastConfig,
    DiffConfig,
    DoctorConfig,
    EvalConfig,
    ExportConfig,
    FindConfig,
    InspectConfig,
    ReportConfig,
    SaesConfig,
    ShowConfig,
    SteerConfig,
    TrainConfig,
)
from fpocli.system.errors import UserError

if TYPE_CHECKING:
    from fpocli.caching.cache import cache
    from fpocli.caching.preview import preview
    from fpocli.comparison.compare import compare
    from fpocli.diagnosis.doctor import doctor
    from fpocli.evaluation.evaluate import evaluate
    from fpocli.interpretation.contrast import contrast
    from fpocli.interpretation.diff import diff
    from fpocli.interpretation.find import find
    from fpocli.interpretation.show import show
    from fpocli.interpretation.steer import steer
    from fpocli.publishing.export import export
    from fpocli.report.inspect import inspect
    from fpocli.report.runs import report_runs
    from fpocli.report.saes import saes
    from fpocli.store.reader import Store
    from fpocli.training.train import train

_MODULES = {
    "cache": "fpocli.caching.cache",
    "preview": "fpocli.caching.preview",
    "train": "fpocli.training.train",
    "evaluate": "fpocli.evaluation.evaluate",
    "compare": "fpocli.comparison.compare",
    "inspect": "fpocli.report.inspect",
    "saes": "fpocli.report.saes",
    "report_runs": "fpocli.report.runs",
    "export": "fpocli.publishing.export",
    "contrast": "fpocli.interpretation.contrast",
    "find": "fpocli.interpretation.find",
    "show": "fpocli.interpretation.show",
    "diff": "fpocli.interpretation.diff",
    "steer": "fpocli.interpretation.steer",
    "doctor": "fpocli.diagnosis.doctor",
    "Store": "fpocli.store.reader",
}

__all__ = [
    "CacheConfig",
    "CompareConfig",
    "ContrastConfig",
    "DiffConfig",
    "DoctorConfig",
    "EvalConfig",
    "ExportConfig",
    "FindConfig",
    "InspectConfig",
    "ReportConfig",
    "SaesConfig",
    "ShowConfig",
    "SteerConfig",
    "Store",
    "TrainConfig",
    "UserError",
    "cache",
    "compare",
    "contrast",
    "diff",
    "doctor",
    "evaluate",
    "export",
    "find",
    "inspect",
    "preview",
    "report_runs",
    "saes",
    "show",
    "steer",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


def __dir__() -> list[str]:
    return __all__
