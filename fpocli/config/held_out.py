"""The settings of fpo train that say which pairs are held out, and what follows from them."""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from typer import Option

from fpocli.system.errors import UserError

# Metrics of the held-out pairs of which one value is better than another.
Metric = Literal[
    "loss",
    "u",
    "margin",
    "accuracy",
    "reward_accuracy",
    "logp_chosen",
    "average_logp_chosen",
    "kl_chosen",
    "kl_rejected",
    "distance_chosen",
    "distance_rejected",
]
# Those that are better where they are lower; the others are where they are higher.
LOWER_IS_BETTER = ("loss", "kl_chosen", "kl_rejected", "distance_chosen", "distance_rejected")
_HIGHER_IS_BETTER = [name for name in get_args(Metric) if name not in LOWER_IS_BETTER]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What is measured meanwhile, and which step it chooses."""

    HEADING = "Evaluation"

    eval_fraction: Annotated[
        float,
        Option(
            min=0, max=0.9, help="Share of the pairs to hold out, scored before and after training."
        ),
    ] = 0.0
    eval_cache: Annotated[
        str | None,
        Option(
            help="A second store, of other pairs with the same reference and SAEs, all of which "
            "are held out; in place of --eval-fraction."
        ),
    ] = None
    eval_every: Annotated[
        int | None, Option(min=1, help="Also score the held-out pairs every so many steps.")
    ] = None
    best: Annotated[
        Metric | None,
        Option(
            metavar="METRIC",
            help="Let final/ be the policy of the evaluated step at which this metric of the "
            f"held-out pairs is best: the lowest {', '.join(LOWER_IS_BETTER)}, or the highest "
            f"{', '.join(_HIGHER_IS_BETTER)}. Default: the last step.",
        ),
    ] = None
    patience: Annotated[
        int | None,
        Option(min=1, help="End after so many evaluations in a row without a better --best."),
    ] = None
    measure_kl: Annotated[
        bool,
        Option(
            "--measure-kl",
            help="Measure the sequential KL of held-out pairs with any method: by the store's "
            "distributions, or else by the reference, which is then loaded.",
        ),
    ] = False
    exact_kl: Annotated[
        bool,
        Option(
            "--exact-kl",
            help="Load the reference for the KL even if the store has distributions, which give a "
            "lower bound.",
        ),
    ] = False

    @property
    def holds_out(self) -> bool:
        """Whether any pairs are held out."""
        return self.eval_fraction > 0 or self.eval_cache is not None

    def check_held_out(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            UserError: they do.
        """
        if self.eval_fraction and self.eval_cache:
            raise UserError(
                "--eval-fraction holds out pairs of the store, and --eval-cache those of another",
                "leave out one of the two",
            )
        needing = {
            "--measure-kl": self.measure_kl,
            "--eval-every": self.eval_every,
            "--best": self.best,
        }
        if not self.holds_out and (named := [flag for flag in needing if needing[flag]]):
            need = "need" if named[1:] else "needs"
            raise UserError(
                f"{' and '.join(named)} {need} held-out pairs, and none are held out",
                "set --eval-fraction, such as 0.05, or --eval-cache",
            )
        if self.best and not self.eval_every:
            raise UserError(
                "--best chooses among evaluations, and there is one after training alone",
                "set --eval-every",
            )
        if self.patience and not self.best:
            raise UserError(
                "--patience needs a metric to watch", "set --best, such as reward_accuracy"
            )
