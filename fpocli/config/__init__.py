"""The settings of every command: one flat frozen dataclass each, each field with its help text.

The command line makes its flags from these fields and the Python API takes the same objects, so
nothing is listed twice. A field's type is what the flag accepts.
"""

from fpocli.config.cache import CacheConfig, DataSettings
from fpocli.config.checks import MAY_DIFFER
from fpocli.config.compare import CompareConfig
from fpocli.config.doctor import DoctorConfig
from fpocli.config.evaluate import EvalConfig
from fpocli.config.export import ExportConfig
from fpocli.config.features import (
    ContrastConfig,
    DiffConfig,
    FindConfig,
    ShowConfig,
    SteerConfig,
)
from fpocli.config.held_out import LOWER_IS_BETTER
from fpocli.config.inspect import InspectConfig
from fpocli.config.methods import METHODS, override
from fpocli.config.report import ReportConfig
from fpocli.config.saes import SaesConfig
from fpocli.config.shared import DEFAULT_DATA, JUDGES, LOGITS, PAIR_COLUMNS
from fpocli.config.train import PRESETS, TrainConfig

__all__ = [
    "DEFAULT_DATA",
    "JUDGES",
    "LOGITS",
    "LOWER_IS_BETTER",
    "MAY_DIFFER",
    "METHODS",
    "PAIR_COLUMNS",
    "PRESETS",
    "CacheConfig",
    "CompareConfig",
    "ContrastConfig",
    "DataSettings",
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
    "TrainConfig",
    "override",
]
