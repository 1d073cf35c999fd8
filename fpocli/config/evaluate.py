"""The settings of fpo eval."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from typer import Argument, Option

from fpocli.config.checks import check_values
from fpocli.config.shared import (
    DEVICE,
    JSON,
    LOGITS,
    PACKED_LENGTH_HELP,
    TRACK,
    TRUST_REMOTE_CODE,
)
from fpocli.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measure a policy on the pairs of a store against its reference, and sample answers.

    Writes eval.json, pairs.jsonl, charts and answer files, and prints a table.
    """

    model: Annotated[str, Argument(help="A run's folder, a model folder or a hub id.")]
    cache: Annotated[str, Option(help="The store that fpo cache wrote.")]
    split: Annotated[
        Literal["eval", "train", "all"] | None,
        Option(help="Which pairs. Default: the held-out ones if there are any, else all."),
    ] = None
    eval_fraction: Annotated[
        float,
        Option(
            min=0, max=0.9, help="Share held out, for a model that was not trained by fpo train."
        ),
    ] = 0.0
    reference: Annotated[
        str | None,
        Option(
            help="The store's reference model, to measure the sequential KL. Without it the KL is "
            "the lower bound that the store's distributions give, if it has them."
        ),
    ] = None
    sae: Annotated[
        list[str],
        Option(
            help="Where the SAEs are now, in the store's order. Default: the paths recorded in the "
            "store."
        ),
    ] = field(default_factory=list)
    at: Annotated[
        list[str],
        Option(
            metavar="SITE",
            help="Hook point at which features are compared, such as layer_25.resid_post. Repeat "
            "for several. Default: those of the run, else all of the store.",
        ),
    ] = field(default_factory=list)
    trust_remote_code: Annotated[bool, TRUST_REMOTE_CODE] = False
    k: Annotated[
        int | None, Option(min=1, help="Top features compared. Default: the run's, else 50.")
    ] = None
    feature_weights: Annotated[
        str | None,
        Option(
            metavar="FILE",
            help="Also measure the distance of the groups of features in this weights file. "
            "Default: the run's.",
        ),
    ] = None
    generate: Annotated[
        list[str],
        Option(
            metavar="PROMPTS",
            help="Sample answers to alpaca_eval, arena_hard or mt_bench, whose questions are "
            "fetched from the hub, or to the prompts of a JSON or JSONL file. Repeat for several.",
        ),
    ] = field(default_factory=list)
    prompts: Annotated[int | None, Option(min=1, help="Answer the first N of each set.")] = None
    temperature: Annotated[
        list[float],
        Option(
            help="Sampling temperature; repeat for several. 0 is greedy. Default: 0.7; for "
            "mt_bench FastChat's, by category."
        ),
    ] = field(default_factory=list)
    top_p: Annotated[float, Option(min=0, max=1, help="Nucleus sampling; 1 keeps all tokens.")] = (
        1.0
    )
    max_new_tokens: Annotated[
        int | None,
        Option(
            min=1,
            help="Maximum tokens of an answer. Default: 2048 for alpaca_eval, arena_hard and "
            "mt_bench, else 512.",
        ),
    ] = None
    batch_size: Annotated[int, Option(min=1, help="Prompts answered at once.")] = 16
    seed: Annotated[int, Option(help="Seed of the sampling.")] = 0
    packed_length: Annotated[int | None, Option(min=1, help=PACKED_LENGTH_HELP)] = None
    device: Annotated[str | None, DEVICE] = None
    out: Annotated[
        str | None, Option(help="Folder of the results. Default: eval in the run's folder.")
    ] = None
    track: Annotated[list[str], TRACK] = field(default_factory=list)
    overwrite: Annotated[
        bool, Option("--overwrite", help="Delete existing samples and sample again.")
    ] = False
    json: Annotated[bool, JSON] = False

    def __post_init__(self) -> None:
        check_values(self)
        if not all(0 <= t < math.inf for t in self.temperature):
            raise UserError("--temperature must be at least 0", "try --temperature 0.7")
        if len(set(self.temperature)) < len(self.temperature):
            raise UserError("a --temperature is repeated", "use each once")
        if self.prompts and not self.generate:
            raise UserError(
                "--prompts limits what --generate answers, and nothing is generated",
                "leave it out, or add --generate, such as alpaca_eval",
            )
        if self.feature_weights == LOGITS:
            raise UserError(
                f"--feature-weights {LOGITS} names no group of features to measure",
                "leave it out, or pass a weights file with groups",
            )
