"""The settings of fpo train, and the paper's presets of them."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from typer import Option

from fpocli.config.checks import check_values
from fpocli.config.shared import PACKED_LENGTH_HELP, TRUST_REMOTE_CODE
from fpocli.system.errors import UserError

Method = Literal["fpo", "dpo_norm", "dpo", "tdpo1", "tdpo2", "simpo", "simpo_kl", "sft"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train the policy alone against a store. Only tdpo1, tdpo2 and simpo_kl, which need the
    reference's whole distribution, load the reference as well.

    Run the same command again to resume from the newest checkpoint in --out. For several
    processes: torchrun --nproc-per-node N -m fpocli train ...
    """

    cache: Annotated[str, Option(help="The store that fpo cache wrote.")]
    method: Annotated[Method, Option(help="The loss.")] = "fpo"
    alpha: Annotated[
        float, Option(min=0, help="Weight of the constraint (fpo, tdpo2, simpo_kl).")
    ] = 0.5
    # None until __post_init__ knows the method.
    beta: Annotated[
        float, Option(min=0, help="Scale of the rewards. Default: 0.1, for simpo and simpo_kl 2.")
    ] = None  # type: ignore[assignment]
    gamma: Annotated[float, Option(min=0, help="Target margin of simpo and simpo_kl.")] = 0.5
    k: Annotated[int, Option(min=1, help="Top features compared by the constraint.")] = 50
    at: Annotated[
        list[str],
        Option(
            metavar="SITE",
            help="Hook point at which the constraint acts, such as layer_25.resid_post. Repeat for "
            "several. Default: all of the store.",
        ),
    ] = field(default_factory=list)
    stop_gradient: Annotated[
        bool,
        Option(
            help="Detach the chosen response's term of the constraint, so only the rejected "
            "response gets its gradient."
        ),
    ] = True
    feature_weights: Annotated[
        str | None,
        Option(help="YAML or JSON file with weights of single features in the distance, by site."),
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
    optimizer: Annotated[
        Literal["adamw", "rmsprop"],
        Option(help="Optimiser. adamw with weight decay 0 is Adam, as in the paper."),
    ] = "adamw"
    lr: Annotated[float, Option(min=0, help="Peak learning rate.")] = 5e-7
    weight_decay: Annotated[float, Option(min=0, help="Weight decay, decoupled for adamw.")] = 0.0
    schedule: Annotated[
        Literal["constant", "cosine", "linear"], Option(help="Learning rate after the warm-up.")
    ] = "constant"
    warmup: Annotated[
        float, Option(min=0, help="Steps of linear warm-up; below 1, a share of all steps.")
    ] = 150.0
    epochs: Annotated[int, Option(min=1, help="Passes over the training pairs.")] = 1
    batch_size: Annotated[int, Option(min=1, help="Pairs per optimiser step, over all ranks.")] = 32
    packed_length: Annotated[int | None, Option(min=1, help=PACKED_LENGTH_HELP)] = None
    grad_clip: Annotated[float, Option(min=0, help="Gradient norm to clip to; 0 is off.")] = 10.0
    seed: Annotated[int, Option(help="Seed of the order of the pairs.")] = 0
    bf16: Annotated[
        bool, Option(help="bfloat16 weights with float32 master weights, or float32 throughout.")
    ] = True
    activation_checkpointing: Annotated[
        bool, Option(help="Recompute activations in the backward pass.")
    ] = True
    zero: Annotated[int, Option(min=0, max=3, help="DeepSpeed ZeRO stage.")] = 2
    deepspeed: Annotated[
        str | None,
        Option(
            help="DeepSpeed JSON file with additional settings. A value that contradicts a flag is "
            'an error; "auto" keeps the flag\'s.'
        ),
    ] = None
    device: Annotated[str | None, Option(help="cpu or cuda. Default: cuda if available.")] = None
    eval_fraction: Annotated[
        float,
        Option(
            min=0, max=0.9, help="Share of the pairs to hold out, scored before and after training."
        ),
    ] = 0.0
    eval_every: Annotated[
        int | None, Option(min=1, help="Also score the held-out pairs every so many steps.")
    ] = None
    measure_kl: Annotated[
        bool,
        Option(
            "--measure-kl",
            help="Load the reference with any method, and measure the sequential KL of held-out "
            "pairs.",
        ),
    ] = False
    allow: Annotated[
        list[str],
        Option(
            help="Train even if this setting differs from the store's: dtype or kernel. Repeatable."
        ),
    ] = field(default_factory=list)
    save_every: Annotated[int, Option(min=1, help="Steps between checkpoints.")] = 500
    keep_checkpoints: Annotated[
        int, Option(min=1, help="Number of newest checkpoints to keep.")
    ] = 1
    out: Annotated[str, Option(help="Folder of the run: config, metrics, checkpoints, final/.")] = (
        "run"
    )
    overwrite: Annotated[
        bool, Option("--overwrite", help="Delete an existing run and start over.")
    ] = False

    def __post_init__(self) -> None:
        check_values(self)
        if self.beta is None:
            object.__setattr__(self, "beta", 2.0 if self.method.startswith("simpo") else 0.1)
        if (self.measure_kl or self.eval_every) and not self.eval_fraction:
            raise UserError(
                "--measure-kl and --eval-every need held-out pairs, and none are held out",
                "set --eval-fraction, such as 0.05",
            )
        without_effect = [
            flag
            for flag, value in (("--feature-weights", self.feature_weights), ("--at", self.at))
            if value and self.method != "fpo"
        ]
        if without_effect:
            raise UserError(
                f"{self.method} compares no features, so {without_effect[0]} would have no effect",
                "leave it out, or use --method fpo",
            )


# The paper's settings (section 4, section 5.3 and Table 5); where it is silent, the defaults.
_PAPER: dict[str, Any] = {"alpha": 0.5, "lr": 5e-7, "batch_size": 32, "epochs": 1}
PRESETS: dict[str, dict[str, Any]] = {
    "paper-2b": _PAPER | {"optimizer": "adamw", "schedule": "constant", "warmup": 150.0},
    "paper-9b": _PAPER | {"optimizer": "rmsprop", "schedule": "constant", "warmup": 150.0},
    "paper-control": _PAPER
    | {"optimizer": "adamw", "lr": 2e-5, "schedule": "cosine", "warmup": 0.1, "batch_size": 64},
}
