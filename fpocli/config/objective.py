"""The settings of fpo train that say what is minimised."""

import math
from dataclasses import dataclass, field
from typing import Annotated

from typer import Option

from fpocli.config.methods import METHODS, Constraint, Reward, complete, parts_of
from fpocli.config.shared import LOGITS
from fpocli.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The reward, the constraint and their weights."""

    HEADING = "Objective"

    # This and the next two are None until __post_init__ knows the others.
    method: Annotated[
        str,
        Option(
            help=f"A name for --reward and --constraint: {', '.join(METHODS)}, or the two with "
            "a plus between, such as dpo+features. Default: fpo.",
            autocompletion=lambda incomplete: [
                name for name in METHODS if name.startswith(incomplete)
            ],
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
    router_aux_loss: Annotated[
        float,
        Option(
            min=0,
            metavar="COEFFICIENT",
            help="Weight of the auxiliary loss that balances the load of a mixture of experts, "
            "such as the router_aux_loss_coef of its config.json.",
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

    def check_objective(self) -> None:
        """Complete the method, its reward, constraint and beta.

        Raises:
            UserError: two settings contradict each other, or one would have no effect.
        """
        self._name_the_method()
        if self.beta is None:
            object.__setattr__(self, "beta", 2.0 if self.reward == "simpo" else 0.1)
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
