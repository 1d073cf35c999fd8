"""The settings of every command: one flat frozen dataclass each, a help text beside each field.

The command line makes its flags from these fields and the Python API takes the same objects, so
nothing is listed twice. A field's type is what the flag accepts.
"""

import math
from dataclasses import dataclass, field
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from typer import Argument, Option

from fpocli.system.errors import UserError

Method = Literal["fpo", "dpo_norm", "dpo", "tdpo1", "tdpo2", "simpo", "simpo_kl", "sft"]
# What may differ from a store without making its numbers wrong, only noisy: --allow's name of it,
# and the store's.
HARMLESS = {"dtype": "dtype", "kernel": "attention"}
DEFAULT_DATA = "HuggingFaceH4/ultrafeedback_binarized"
_TRUST = Option(
    "--trust-remote-code",
    help="Run the Python code that the models bring with them. A YAML file cannot ask for it.",
)
_TOKENS_PER_ROW = (
    "Tokens of one packed row, which is scored at once; pairs share rows. More is faster up to a "
    "point and takes more memory. Default: 8192 on a GPU, 2048 on a CPU."
)


def _check(config: Any) -> None:
    """Hold a config made in Python, or from a grid's YAML, to what its flags would accept."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value, (kind, *flags) = getattr(config, name), get_args(hint)
        if value is None:
            # Of KIND | None, or filled in later.
            if NoneType in get_args(kind) or getattr(type(config), name, ...) is None:
                continue
            raise UserError(f"--{name.replace('_', '-')} has no value", "give one, or leave it out")
        if NoneType in get_args(kind):
            kind = get_args(kind)[0]  # of KIND | None
        flag = "--" + name.replace("_", "-")
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise UserError(f"{flag} {value} is unknown", f"take {', '.join(get_args(kind))}")
            continue
        if get_origin(kind) is list:
            if not isinstance(value, (list, tuple)):
                raise UserError(f"{flag} {value} is not a list", f"write {name}=[{value!r}]")
            value = [_convert(flag, item, get_args(kind)[0]) for item in value]
            if name == "allow" and (wrong := [item for item in value if item not in HARMLESS]):
                raise UserError(f"--allow {wrong[0]} is unknown", f"take {' or '.join(HARMLESS)}")
        else:
            value = _convert(flag, value, kind)
        object.__setattr__(config, name, value)
        for bound in flags:
            low, high = bound.min, bound.max
            # Written so that nan is out of every range.
            if (low is not None and not value >= low) or (high is not None and not value <= high):
                raise UserError(f"{flag} {value} is out of range", f"see `fpo --help` for {flag}")


def _convert(flag: str, value: Any, kind: type) -> Any:
    """The value as its type; YAML reads 2e-5 as a text, and 3 where 3.0 is meant."""
    if kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
    elif isinstance(value, str) and "\0" in value:
        raise UserError(f"{flag} holds a null character", "write a plain text")
    elif isinstance(value, (str, int, float)):
        try:
            converted = kind(value)
        except (ValueError, OverflowError):
            pass
        else:
            # 2.5 is no whole number.
            if kind is not int or isinstance(value, str) or converted == value:
                return converted
    raise UserError(f"{flag} {value} is no {kind.__name__}", f"see `fpo --help` for {flag}")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Run the frozen reference model and its SAE once and write the store that training reads.

    The same command given again goes on where a stopped run ended. For several processes:
    torchrun --nproc-per-node N -m fpocli cache ..., or the command on any host with --join.
    """

    model: Annotated[
        str, Option(help="Reference model: gemma-2-2b, gemma-2-9b, a hub id or a local folder.")
    ]
    layer: Annotated[
        list[int], Option(help="Decoder layer of the site, from 0. Repeat for several sites.")
    ]
    site: Annotated[
        list[str],
        Option(help="resid_post (the layer's output) or mlp_out. One for all layers, or one each."),
    ] = field(default_factory=lambda: ["resid_post"])
    sae: Annotated[
        list[str],
        Option(
            help="SAE of each layer: sae-lens release/id, a sae-lens folder, or a Gemma Scope "
            "params.npz. For Gemma-2 the default is Gemma Scope's canonical one of width 16k.",
        ),
    ] = field(default_factory=list)
    data: Annotated[
        str, Option(help="Preference pairs: hub id, JSON, JSONL, Parquet or a saved data set.")
    ] = DEFAULT_DATA
    split: Annotated[
        str | None,
        Option(help="Split of a data set. Default: train_prefs for UltraFeedback, else train."),
    ] = None
    limit: Annotated[int | None, Option(min=1, help="Read only the first so many rows.")] = None
    strict: Annotated[
        bool, Option("--strict", help="Stop at the first row of the data that cannot be used.")
    ] = False
    chat_template: Annotated[
        str | None,
        Option(
            help="gemma, chatml, halos or a Jinja file. Default: the tokeniser's own; a base "
            "model without one gets halos (the paper's <|user|> / <|assistant|> format).",
        ),
    ] = None
    top_k: Annotated[
        str, Option(help="How many of the largest pooled features to keep per response, or all.")
    ] = "256"
    value_dtype: Annotated[
        Literal["float32", "float16"], Option(help="How feature values are stored.")
    ] = "float32"
    max_length: Annotated[
        int, Option(min=2, help="Tokens of prompt plus response; longer responses are cut.")
    ] = 2048
    max_prompt_length: Annotated[
        int, Option(min=1, help="Pairs with a longer prompt are dropped and counted.")
    ] = 1024
    dtype: Annotated[
        Literal["bfloat16", "float32", "float16"], Option(help="Dtype the model runs in.")
    ] = "bfloat16"
    device: Annotated[
        str | None, Option(help="cpu, cuda, cuda:1, ... Default: cuda when there is one.")
    ] = None
    tokens_per_row: Annotated[int | None, Option(min=1, help=_TOKENS_PER_ROW)] = None
    block: Annotated[
        int, Option(min=1, help="Pairs per block: the unit of work and of what a crash can lose.")
    ] = 1024
    trust_remote_code: Annotated[bool, _TRUST] = False
    allow: Annotated[
        list[str], Option(help="Go on with a store although this differs: dtype, kernel.")
    ] = field(default_factory=list)
    drop_non_finite: Annotated[
        bool,
        Option("--drop-non-finite", help="Leave pairs out whose numbers are NaN or infinite."),
    ] = False
    join: Annotated[
        bool, Option("--join", help="Take blocks of a store that other commands write, too.")
    ] = False
    repair: Annotated[
        bool, Option("--repair", help="Find what is damaged in the store and score it anew.")
    ] = False
    out: Annotated[str, Option(help="The store to write.")] = "ref.zarr"
    overwrite: Annotated[bool, Option("--overwrite", help="Replace a store that is there.")] = False

    def __post_init__(self) -> None:
        _check(self)
        if self.repair and self.overwrite:
            raise UserError(
                "--repair keeps what --overwrite would throw away", "give one of the two"
            )
        if not self.layer:
            raise UserError("no layer is given", "name the site's decoder layer, --layer 25")
        if unknown := [kind for kind in self.site if kind not in ("resid_post", "mlp_out")]:
            raise UserError(f"--site {unknown[0]} is unknown", "take resid_post or mlp_out")
        if len(self.site) not in (1, len(self.layer)):
            raise UserError(
                f"{len(self.site)} sites are given for {len(self.layer)} layers",
                "give --site once for all layers, or once for each",
            )
        if self.sae and len(self.sae) != len(self.layer):
            raise UserError(
                f"{len(self.sae)} SAEs are given for {len(self.layer)} layers",
                "give one --sae for each --layer, in the same order",
            )
        if self.top_k != "all" and not (self.top_k.isdecimal() and int(self.top_k) > 0):
            raise UserError(
                f"--top-k {self.top_k} is neither a positive number nor 'all'",
                "256 is the default; all makes the feature distance exact",
            )

    @property
    def sites(self) -> list[tuple[int, str]]:
        """(layer, kind) of every site, in the order of --layer."""
        kinds = self.site * len(self.layer) if len(self.site) == 1 else self.site
        return list(zip(self.layer, kinds, strict=True))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train the policy alone against a store. Only tdpo1, tdpo2 and simpo_kl, which need the
    reference's whole distribution, load the reference beside it.

    The same command given again goes on from the newest checkpoint in --out. For several
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
    stop_gradient: Annotated[
        bool, Option(help="Let the constraint push the rejected response only.")
    ] = True
    feature_weights: Annotated[
        str | None,
        Option(help="YAML or JSON with weights of single features in the distance, by site."),
    ] = None
    model: Annotated[
        str | None,
        Option(help="Start from other weights of the same tokeniser. Default: the reference."),
    ] = None
    reference: Annotated[
        str | None,
        Option(help="Where the reference model is now, if no longer where the store says."),
    ] = None
    sae: Annotated[
        list[str],
        Option(help="Where the SAEs are now, in the store's order, if no longer where it says."),
    ] = field(default_factory=list)
    trust_remote_code: Annotated[bool, _TRUST] = False
    optimizer: Annotated[
        Literal["adamw", "rmsprop"], Option(help="AdamW without decay is the paper's Adam.")
    ] = "adamw"
    lr: Annotated[float, Option(min=0, help="Peak learning rate.")] = 5e-7
    weight_decay: Annotated[float, Option(min=0, help="Decoupled for adamw.")] = 0.0
    schedule: Annotated[
        Literal["constant", "cosine", "linear"], Option(help="After the warm-up.")
    ] = "constant"
    warmup: Annotated[
        float, Option(min=0, help="Steps of linear warm-up; below 1, a share of all steps.")
    ] = 150.0
    epochs: Annotated[int, Option(min=1, help="Passes over the training pairs.")] = 1
    batch_size: Annotated[int, Option(min=1, help="Pairs per optimiser step, all ranks.")] = 32
    tokens_per_row: Annotated[int | None, Option(min=1, help=_TOKENS_PER_ROW)] = None
    grad_clip: Annotated[float, Option(min=0, help="Largest gradient norm; 0 is off.")] = 10.0
    seed: Annotated[int, Option(help="Of the order of the pairs.")] = 0
    bf16: Annotated[
        bool, Option(help="bfloat16 weights with float32 master weights; else float32.")
    ] = True
    activation_checkpointing: Annotated[
        bool, Option(help="Recompute activations in the backward pass.")
    ] = True
    zero: Annotated[int, Option(min=0, max=3, help="DeepSpeed ZeRO stage.")] = 2
    deepspeed: Annotated[
        str | None, Option(help="DeepSpeed JSON, merged over what the flags give.")
    ] = None
    device: Annotated[str | None, Option(help="cpu or cuda. Default: cuda when there is one.")] = (
        None
    )
    eval_fraction: Annotated[
        float, Option(min=0, max=0.9, help="Share of the pairs held out and scored at both ends.")
    ] = 0.0
    eval_every: Annotated[
        int | None, Option(min=1, help="Score the held-out pairs after every so many steps, too.")
    ] = None
    measure_kl: Annotated[
        bool,
        Option(
            "--measure-kl",
            help="Load the reference, whatever the method, and measure the sequential KL of "
            "held-out pairs.",
        ),
    ] = False
    allow: Annotated[
        list[str], Option(help="Train although this differs from the store: dtype, kernel.")
    ] = field(default_factory=list)
    save_every: Annotated[int, Option(min=1, help="Steps between checkpoints.")] = 500
    keep_checkpoints: Annotated[
        int, Option(min=1, help="How many of the newest checkpoints stay.")
    ] = 1
    out: Annotated[str, Option(help="Folder for config, metrics, checkpoints and final/.")] = "run"
    overwrite: Annotated[bool, Option("--overwrite", help="Start the run anew.")] = False

    def __post_init__(self) -> None:
        _check(self)
        if self.beta is None:
            object.__setattr__(self, "beta", 2.0 if self.method.startswith("simpo") else 0.1)
        if (self.measure_kl or self.eval_every) and not self.eval_fraction:
            raise UserError(
                "--measure-kl and --eval-every measure held-out pairs, and none are held out",
                "give --eval-fraction, such as 0.05",
            )
        if self.feature_weights and self.method != "fpo":
            raise UserError(
                f"{self.method} compares no features, so --feature-weights would do nothing",
                "leave it out, or take --method fpo",
            )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measure a policy on the pairs of a store, beside its reference, and sample answers.

    Writes eval.json, pairs.jsonl, charts and answer files, and prints a table.
    """

    model: Annotated[str, Argument(help="A run's folder, a model folder or a hub id.")]
    cache: Annotated[str, Option(help="The store that fpo cache wrote.")]
    split: Annotated[
        Literal["eval", "train", "all"] | None,
        Option(help="Which pairs. Default: the held-out ones where there are any, else all."),
    ] = None
    eval_fraction: Annotated[
        float,
        Option(min=0, max=0.9, help="Share held out, for a model that is no run of fpo train."),
    ] = 0.0
    reference: Annotated[
        str | None,
        Option(help="The store's reference model; with it the sequential KL is measured."),
    ] = None
    sae: Annotated[
        list[str],
        Option(help="Where the SAEs are now, in the store's order, if no longer where it says."),
    ] = field(default_factory=list)
    trust_remote_code: Annotated[bool, _TRUST] = False
    k: Annotated[
        int | None, Option(min=1, help="Top features compared. Default: the run's, else 50.")
    ] = None
    generate: Annotated[
        str | None,
        Option(
            metavar="PROMPTS",
            help="Sample answers to the prompts of a JSON or JSONL file. The question files of "
            "AlpacaEval, Arena-Hard and MT-Bench are known.",
        ),
    ] = None
    temperature: Annotated[
        list[float], Option(help="Of the sampling; repeat for several. 0 takes the likeliest.")
    ] = field(default_factory=lambda: [0.7])
    top_p: Annotated[float, Option(min=0, max=1, help="Of the sampling; 1 is all tokens.")] = 1.0
    max_new_tokens: Annotated[int, Option(min=1, help="The longest answer.")] = 512
    batch_size: Annotated[int, Option(min=1, help="Prompts answered at once.")] = 16
    seed: Annotated[int, Option(help="Of the sampling.")] = 0
    tokens_per_row: Annotated[int | None, Option(min=1, help=_TOKENS_PER_ROW)] = None
    device: Annotated[
        str | None, Option(help="cpu, cuda, cuda:1, ... Default: cuda when there is one.")
    ] = None
    out: Annotated[
        str | None, Option(help="Folder of the results. Default: eval in the run's folder.")
    ] = None
    overwrite: Annotated[bool, Option("--overwrite", help="Sample anew.")] = False
    json: Annotated[bool, Option("--json", help="Print JSON.")] = False

    def __post_init__(self) -> None:
        _check(self)
        if not self.temperature or not all(0 <= t < math.inf for t in self.temperature):
            raise UserError("--temperature needs numbers from 0 up", "try --temperature 0.7")
        if len(set(self.temperature)) < len(self.temperature):
            raise UserError("a --temperature is given twice", "give each once")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Cache, train and evaluate a grid of runs, and write the paper's tables and figures.

    What is done is not done anew, so the same command goes on where it was stopped.
    """

    config_file: Annotated[
        str, Argument(metavar="CONFIG.yaml", help="The grid; examples/paper has some.")
    ]
    plan: Annotated[
        bool, Option("--plan", help="Only list the commands, and which of them are done.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what is in a store."""

    store: Annotated[str, Argument(help="The store.")]
    pair: Annotated[
        int | None, Option(min=0, help="Show one pair: text, numbers, top features.")
    ] = None
    verify: Annotated[
        bool, Option("--verify", help="Read everything back and check every sum.")
    ] = False
    json: Annotated[bool, Option("--json", help="Print JSON.")] = False


# The paper's settings (its section 4, section 5.3 and Table 5). Where it is silent, the defaults
# hold.
_PAPER: dict[str, Any] = {"alpha": 0.5, "lr": 5e-7, "batch_size": 32, "epochs": 1}
PRESETS: dict[str, dict[str, Any]] = {
    "paper-2b": _PAPER | {"optimizer": "adamw", "schedule": "constant", "warmup": 150.0},
    "paper-9b": _PAPER | {"optimizer": "rmsprop", "schedule": "constant", "warmup": 150.0},
    "paper-control": _PAPER
    | {"optimizer": "adamw", "lr": 2e-5, "schedule": "cosine", "warmup": 0.1, "batch_size": 64},
}
