"""The settings of fpo train, and the paper's presets of them."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from typer import Option

from fpocli.config.adapters import Adapter
from fpocli.config.checks import check_device_of_many, check_values
from fpocli.config.held_out import HeldOut
from fpocli.config.objective import Objective
from fpocli.config.optimization import Hardware, Optimization
from fpocli.config.shared import PAIR_COLUMNS, TRACK, TRUST_REMOTE_CODE
from fpocli.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What training starts from."""

    HEADING = "Data and models"

    cache: Annotated[str, Option(help="The store that fpo cache wrote: a folder or a URL.")]
    where: Annotated[
        str | None,
        Option(
            metavar="CONDITION",
            help="Train only on pairs of which this holds, such as 'margin > -1 and chosen_tokens "
            f"< 800'. It compares {', '.join(PAIR_COLUMNS)}. Held-out pairs stay the same.",
        ),
    ] = None
    model: Annotated[
        str | None,
        Option(help="Start from other weights with the same tokeniser. Default: the reference."),
    ] = None
    reference: Annotated[
        str | None,
        Option(help="Where the reference model is now. Default: the path recorded in the store."),
    ] = None
    sae: Annotated[
        list[str],
        Option(
            help="Where the SAEs are now, in the store's order. Default: the paths recorded in the "
            "store."
        ),
    ] = field(default_factory=list)
    trust_remote_code: Annotated[bool, TRUST_REMOTE_CODE] = False
    allow: Annotated[
        list[str],
        Option(
            help="Train even if this setting differs from the store's: dtype or kernel. Repeatable."
        ),
    ] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Output:
    """What is written."""

    HEADING = "Output"

    out: Annotated[str, Option(help="Folder of the run: config, metrics, checkpoints, final/.")] = (
        "run"
    )
    overwrite: Annotated[
        bool, Option("--overwrite", help="Delete an existing run and start over.")
    ] = False

    track: Annotated[list[str], TRACK] = field(default_factory=list)
    save_every: Annotated[int, Option(min=1, help="Steps between checkpoints.")] = 500
    keep_checkpoints: Annotated[
        int, Option(min=1, help="Number of newest checkpoints to keep, beside that of --best.")
    ] = 1
    max_minutes: Annotated[
        float | None,
        Option(
            min=0,
            help="Save a checkpoint and end this command after so many minutes; the same command "
            "goes on. final/ is written at the end of the run alone.",
        ),
    ] = None


# A dataclass takes the fields of its last base first.
@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Output, HeldOut, Hardware, Optimization, Adapter, Objective, _Start):
    """Train the policy alone against a store.

    A method is a reward and a constraint: fpo is dpo_norm with features, tdpo2 is dpo with kl. A
    constraint on the KL reads the store's distributions (fpo cache --distributions); if it has
    none, the reference is loaded as well.

    Run the same command again to resume from the newest checkpoint in --out, also with another
    number of processes.
    """

    def __post_init__(self) -> None:
        check_values(self)
        self.check_objective()
        self.check_adapter(self.zero)
        self.check_held_out()
        if self.gpus:
            check_device_of_many(self.device, "--gpus gives each")
        if self.where is not None:
            # It imports numpy, which a config does not need otherwise.
            from fpocli.system.conditions import Condition

            Condition(self.where, PAIR_COLUMNS, "--where")
        if self.exact_kl and not (self.needs_kl or self.measure_kl):
            raise UserError(
                f"{self.method} needs no KL, so --exact-kl would have no effect",
                "leave it out, or add --measure-kl",
            )
        best = self.best or ""
        if best.startswith("kl_") and not (self.needs_kl or self.measure_kl):
            raise UserError(
                f"--best {best} needs the KL, which {self.method} does not measure",
                "add --measure-kl, or choose another metric",
            )
        if best.startswith("distance_") and self.constraint != "features":
            raise UserError(
                f"--best {best} needs the distance, which {self.method} does not measure",
                "choose another metric, or use --constraint features",
            )


# The paper's settings (section 4, section 5.3 and Table 5); where it is silent, the defaults.
_PAPER: dict[str, Any] = {"alpha": 0.5, "lr": 5e-7, "batch_size": 32, "epochs": 1}
PRESETS: dict[str, dict[str, Any]] = {
    "paper-2b": _PAPER | {"optimizer": "adamw", "schedule": "constant", "warmup": 150.0},
    "paper-9b": _PAPER | {"optimizer": "rmsprop", "schedule": "constant", "warmup": 150.0},
    "paper-control": _PAPER
    | {"optimizer": "adamw", "lr": 2e-5, "schedule": "cosine", "warmup": 0.1, "batch_size": 64},
}
