"""The settings of fpo train, and the paper's presets of them."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from typer import Option

from fpocli.config.checks import check_values
from fpocli.config.methods import METHODS, Constraint, Reward, complete, parts_of
from fpocli.config.shared import LOGITS, PACKED_LENGTH_HELP, TRUST_REMOTE_CODE
from fpocli.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train the policy alone against a store.

    A method is a reward and a constraint: fpo is dpo_norm with features, tdpo2 is dpo with kl. A
    constraint on the KL reads the store's distributions (fpo cache --distributions); if it has
    none, the reference is loaded as well.

    Run the same command again to resume from the newest checkpoint in --out, also with another
    number of processes.
    """

    cache: Annotated[str, Option(help="The store that fpo cache wrote: a folder or a URL.")]
    # This and the next two are None until __post_init__ knows the others.
    method: Annotated[
        str,
        Option(
            help=f"A name for --reward and --constraint: {', '.join(METHODS)}, or the two with "
            "a plus between, such as dpo+features. Default: fpo.",
        ),
    ] = None  # type: ignore[assignment]
    reward: Annotated[
        Reward,
        Option(
            help="Of a response: dpo (log-probability against the reference), dpo_norm (the same "
            "per token), simpo (per token, without a reference, with --gamma); sft is not "
            "pairwise. Default: that of --method, or else of fpo."
        ),
    ] = None  # type: ignore[assignment]
    constraint: Annotated[
        Constraint,
        Option(
            help="What keeps the policy near the reference: none, features (the distance of SAE "
            "features), kl (the sequential KL, per token if the reward is), tdpo1 (as kl, with an "
            "alpha of 1 and the gradient of both responses). Default: that of --method, or else "
            "of fpo."
        ),
    ] = None  # type: ignore[assignment]
    alpha: Annotated[float, Option(min=0, help="Weight of the constraint (features, kl).")] = 0.5
    hold: Annotated[
        float | None,
        Option(
            help="Adapt alpha in every step so that the mean distance (constraint features) or KL "
            "(constraint kl) of the rejected responses does not stay above this value: the "
            "distance as distance_rejected in metrics.jsonl has it, the KL in nats per response "
            "(reward dpo) or per token (others). --alpha is then only where it starts.",
        ),
    ] = None
    # None until __post_init__ knows the reward.
    beta: Annotated[
        float, Option(min=0, help="Scale of the rewards. Default: 0.1, for the reward simpo 2.")
    ] = None  # type: ignore[assignment]
    gamma: Annotated[float, Option(min=0, help="Target margin of the reward simpo.")] = 0.5
    sft_weight: Annotated[
        float,
        Option(
            min=0,
            help="Weight of an added SFT loss on the chosen response, per token, against chosen "
            "responses that become less likely; such as 0.1.",
        ),
    ] = 0.0
    label_smoothing: Annotated[
        float,
        Option(
            min=0,
            max=0.5,
            help="Probability that a pair's preference is the wrong way round; such as 0.1 in "
            "conservative DPO.",
        ),
    ] = 0.0
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
        Option(
            help="YAML or JSON file with weights of single features in the distance, by site; or "
            f"{LOGITS}: features that move the logits more weigh more."
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
    gpus: Annotated[
        int | None,
        Option(
            min=1,
            help="Start one process for each of so many GPUs of this machine, by torchrun; with "
            "--device cpu, so many processes. Default: this process alone, or those of the "
            "launcher that started it.",
        ),
    ] = None
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
        self._name_the_method()
        if self.beta is None:
            object.__setattr__(self, "beta", 2.0 if self.reward == "simpo" else 0.1)
        if (self.measure_kl or self.eval_every) and not self.eval_fraction:
            raise UserError(
                "--measure-kl and --eval-every need held-out pairs, and none are held out",
                "set --eval-fraction, such as 0.05",
            )
        if self.exact_kl and not (self.needs_kl or self.measure_kl):
            raise UserError(
                f"{self.method} needs no KL, so --exact-kl would have no effect",
                "leave it out, or add --measure-kl",
            )
        self._check_hold()
        if self.reward == "sft" and (self.sft_weight or self.label_smoothing):
            raise UserError(
                "sft is not pairwise, so --sft-weight and --label-smoothing would have no effect",
                "leave them out, or use a pairwise --reward",
            )
        without_effect = [
            flag
            for flag, value in (("--feature-weights", self.feature_weights), ("--at", self.at))
            if value and self.constraint != "features"
        ]
        if without_effect:
            raise UserError(
                f"{self.method} compares no features, so {without_effect[0]} would have no effect",
                "leave it out, or use --constraint features",
            )

    @property
    def needs_kl(self) -> bool:
        """Whether the constraint is on the KL."""
        return self.constraint in ("kl", "tdpo1")

    def _check_hold(self) -> None:
        """See whether alpha can hold the value.

        Raises:
            UserError: it cannot.
        """
        if self.hold is None:
            return
        acts = self.constraint in ("features", "kl") and self.beta > 0
        if not (0 < self.hold < math.inf and acts):
            raise UserError(
                f"--hold {self.hold} needs a number above 0, a constraint that has an alpha, and a "
                "--beta above 0",
                "use --constraint features or kl",
            )
        if not self.stop_gradient:
            raise UserError(
                "--hold with --no-stop-gradient would push the chosen responses away from the "
                "reference as alpha rises",
                "leave out one of the two",
            )

    def _name_the_method(self) -> None:
        """Set method, reward and constraint, of which some are given.

        Raises:
            UserError: the method is unknown, or is not made of this reward and constraint.
        """
        reward, constraint = complete(self.method or "fpo", self.reward, self.constraint)
        if self.method and (reward, constraint) != (named := parts_of(self.method)):
            raise UserError(
                f"--method {self.method} is the reward {named[0]} with the constraint {named[1]}, "
                f"and {reward} with {constraint} is asked for",
                "leave out --method, or the other two",
            )
        if reward == "sft" and constraint != "none":
            raise UserError(
                "sft is not pairwise, so it takes no --constraint", "leave one of the two out"
            )
        names = {parts: name for name, parts in METHODS.items()}
        method = names.get((reward, constraint), f"{reward}+{constraint}")
        for name, value in (("method", method), ("reward", reward), ("constraint", constraint)):
            object.__setattr__(self, name, value)


# The paper's settings (section 4, section 5.3 and Table 5); where it is silent, the defaults.
_PAPER: dict[str, Any] = {"alpha": 0.5, "lr": 5e-7, "batch_size": 32, "epochs": 1}
PRESETS: dict[str, dict[str, Any]] = {
    "paper-2b": _PAPER | {"optimizer": "adamw", "schedule": "constant", "warmup": 150.0},
    "paper-9b": _PAPER | {"optimizer": "rmsprop", "schedule": "constant", "warmup": 150.0},
    "paper-control": _PAPER
    | {"optimizer": "adamw", "lr": 2e-5, "schedule": "cosine", "warmup": 0.1, "batch_size": 64},
}
