"""The settings of fpo features: contrast, find, show, diff and steer."""

import math
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Literal

from typer import Argument, Option

from fpocli.config.checks import check_values
from fpocli.config.shared import DEVICE, JSON, PACKED_LENGTH_HELP, TRUST_REMOTE_CODE
from fpocli.system.errors import UserError

_SITE = Option(
    metavar="SITE",
    help="Hook point, such as layer_25.resid_post. Default: the store's only one.",
)
_LABELS = Option(
    metavar="FILE",
    help="Neuronpedia's explanations of this SAE: a batch-N.jsonl or .jsonl.gz of its export.",
)
_SAE = Option(help="Where the SAE is now. Default: the path recorded in the store.")
_RATE = Option(min=0, max=1, help="Share of false findings among the features found.")
_TOP = Option(min=1, help="Features in the table.")
# Of the commands that begin with a model and not with a store.
_LAYER = Option(min=0, help="Decoder layer of the hook point, from 0.")
_KIND = Option(help="Kind of the hook point.")
_SAE_OR_DEFAULT = Option(help="The SAE, as in fpo cache. Default: as there.")
_TEMPLATE = Option(help="gemma, chatml, halos or a Jinja file, as in fpo cache.")
_DTYPE = Option(help="Dtype of the model.")


@dataclass(frozen=True, kw_only=True)
class ContrastConfig:
    """Which features separate chosen from rejected responses, from the store alone.

    For every feature the difference of means and of frequencies, its effect size with an interval,
    a test corrected for the number of features, and how much of it length and plain style explain.
    """

    store: Annotated[str, Argument(help="The store.")]
    at: Annotated[str | None, _SITE] = None
    model: Annotated[
        str | None,
        Option(
            help="Where the store's model is now, whose tokeniser gives the texts. Default: the "
            "path recorded in the store."
        ),
    ] = None
    rate: Annotated[float, _RATE] = 0.05
    top: Annotated[int, _TOP] = 20
    labels: Annotated[str | None, _LABELS] = None
    json: Annotated[bool, JSON] = False

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True, kw_only=True)
class FindConfig:
    """Find the features of a kind of text: a language, a format, a tone.

    The paper's two steps (section 5.3): the candidates by the largest activation on single tokens
    of the target texts, then those whose mean activation over the whole target set is above the
    background's. Writes a weights file for `fpo train --feature-weights`, with one group.
    """

    model: Annotated[str, Option(help="The model, named as in fpo cache.")]
    layer: Annotated[int, _LAYER]
    site: Annotated[Literal["resid_post", "mlp_out"], _KIND] = "resid_post"
    sae: Annotated[str | None, _SAE_OR_DEFAULT] = None
    target: Annotated[
        str,
        Option(
            help="Texts of the kind: rows with text, rows with prompt and response, or pairs as "
            "--data of fpo cache."
        ),
    ]
    against: Annotated[
        str | None,
        Option(help="Texts that are not of the kind, in the same layouts, or a store."),
    ] = None
    limit: Annotated[int, Option(min=2, help="Read at most this many texts of each.")] = 256
    candidates: Annotated[int, Option(min=1, help="Features that the first step keeps.")] = 50
    rate: Annotated[
        float,
        Option(min=0, max=1, help="Highest chance that any feature found is a false one."),
    ] = 0.05
    top: Annotated[int, Option(min=1, help="Features in the group at most.")] = 20
    contexts: Annotated[int, Option(min=0, help="Contexts shown for each feature.")] = 2
    group: Annotated[
        str | None, Option(help="Name of the group. Default: that of the target file.")
    ] = None
    chat_template: Annotated[str | None, _TEMPLATE] = None
    labels: Annotated[str | None, _LABELS] = None
    dtype: Annotated[Literal["bfloat16", "float32"], _DTYPE] = "bfloat16"
    packed_length: Annotated[int | None, Option(min=1, help=PACKED_LENGTH_HELP)] = None
    device: Annotated[str | None, DEVICE] = None
    trust_remote_code: Annotated[bool, TRUST_REMOTE_CODE] = False
    out: Annotated[
        str, Option(help="The weights file to write; a group is added to an existing one.")
    ] = "features.yaml"
    json: Annotated[bool, JSON] = False

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Show one feature of a store: how often it fires in chosen and rejected responses, the pairs
    where it is largest, and the tokens it fires on, for which the reference is run."""

    store: Annotated[str, Argument(help="The store.")]
    feature: Annotated[int, Option(min=0, help="The feature's index.")]
    at: Annotated[str | None, _SITE] = None
    pairs: Annotated[int, Option(min=1, help="Pairs shown.")] = 5
    contexts: Annotated[
        int, Option(min=0, help="Contexts, of the first pairs; 0 loads no model.")
    ] = 5
    labels: Annotated[str | None, _LABELS] = None
    reference: Annotated[
        str | None,
        Option(help="Where the reference model is now. Default: the path recorded in the store."),
    ] = None
    sae: Annotated[str | None, _SAE] = None
    device: Annotated[str | None, DEVICE] = None
    trust_remote_code: Annotated[bool, TRUST_REMOTE_CODE] = False
    json: Annotated[bool, JSON] = False

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True, kw_only=True)
class DiffConfig:
    """What training did to the model, feature by feature, over the pairs that fpo eval measured.

    Several runs stand side by side.
    """

    runs: Annotated[list[str], Argument(metavar="RUN", help="Folders of runs, evaluated.")]
    cache: Annotated[
        str | None, Option(help="The store, for contexts. Default: the path that fpo eval noted.")
    ] = None
    at: Annotated[
        str | None,
        Option(metavar="SITE", help="Hook point. Default: the only one that all runs measured."),
    ] = None
    rate: Annotated[float, _RATE] = 0.05
    top: Annotated[int, _TOP] = 20
    contexts: Annotated[
        int, Option(min=0, help="Contexts shown for each feature; 0 loads no model.")
    ] = 1
    labels: Annotated[str | None, _LABELS] = None
    sae: Annotated[str | None, _SAE] = None
    device: Annotated[str | None, DEVICE] = None
    trust_remote_code: Annotated[bool, TRUST_REMOTE_CODE] = False
    json: Annotated[bool, JSON] = False

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True, kw_only=True)
class SteerConfig:
    """Sample from a model with chosen features added or ablated, beside samples without."""

    model: Annotated[str, Option(help="The model, named as in fpo cache, or a run's final/.")]
    layer: Annotated[int, _LAYER]
    site: Annotated[Literal["resid_post", "mlp_out"], _KIND] = "resid_post"
    sae: Annotated[str | None, _SAE_OR_DEFAULT] = None
    add: Annotated[
        list[str],
        Option(
            metavar="FEATURE=VALUE",
            help="Add VALUE to the feature's activation at every position. Repeatable.",
        ),
    ] = field(default_factory=list)
    ablate: Annotated[
        list[int],
        Option(metavar="FEATURE", help="Set the feature to 0 at every position. Repeatable."),
    ] = field(default_factory=list)
    prompt: Annotated[list[str], Option(help="A prompt. Repeatable.")] = field(default_factory=list)
    prompts: Annotated[
        str | None, Option(metavar="FILE", help="Prompts in a JSON or JSONL file, as in fpo eval.")
    ] = None
    limit: Annotated[int | None, Option(min=1, help="Use the first N prompts of the file.")] = None
    temperature: Annotated[float, Option(min=0, help="Of the sampling; 0 is greedy.")] = 0.0
    top_p: Annotated[float, Option(min=0, max=1, help="Nucleus sampling; 1 keeps all tokens.")] = (
        1.0
    )
    max_new_tokens: Annotated[int, Option(min=1, help="Maximum tokens of an answer.")] = 64
    seed: Annotated[int, Option(help="Seed of the sampling.")] = 0
    chat_template: Annotated[str | None, _TEMPLATE] = None
    dtype: Annotated[Literal["bfloat16", "float32"], _DTYPE] = "bfloat16"
    device: Annotated[str | None, DEVICE] = None
    trust_remote_code: Annotated[bool, TRUST_REMOTE_CODE] = False
    json: Annotated[bool, JSON] = False

    def __post_init__(self) -> None:
        check_values(self)
        if not (self.add or self.ablate):
            raise UserError("no feature is named", "use --add FEATURE=VALUE or --ablate FEATURE")
        if not (self.prompt or self.prompts):
            raise UserError("no prompt is named", "use --prompt TEXT or --prompts FILE")
        if not all(text.strip() for text in self.prompt):
            raise UserError("a --prompt is empty", "write a question")
        if self.temperature == math.inf:
            raise UserError("--temperature must be a number", "try --temperature 0.7")
        named = [feature for feature, _ in self._pairs()] + self.ablate
        if twice := [str(feature) for feature in named if named.count(feature) > 1]:
            raise UserError(
                f"the feature {twice[0]} is named twice", "use one --add or one --ablate for each"
            )

    @property
    def added(self) -> dict[int, float]:
        """The value that is added to each feature of --add."""
        return dict(self._pairs())

    def _pairs(self) -> list[tuple[int, float]]:
        return [_read_addition(text) for text in self.add]


def _read_addition(text: str) -> tuple[int, float]:
    """Feature and value of an --add.

    Raises:
        UserError: it is not FEATURE=VALUE.
    """
    feature, _, value = text.partition("=")
    with suppress(ValueError):
        if math.isfinite(number := float(value)):
            return int(feature), number
    raise UserError(
        f"--add {text} is not a feature's index and a finite number",
        "write FEATURE=VALUE, such as --add 1041=8",
    )
