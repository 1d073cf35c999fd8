"""The settings of fpo cache."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from typer import Option

from fpocli.config.checks import check_device_of_many, check_values
from fpocli.config.imported import ImportSettings, check_import
from fpocli.config.shared import DEFAULT_DATA, DEVICE, PACKED_LENGTH_HELP, TRUST_REMOTE_CODE
from fpocli.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class _Model:
    """The reference model, its hook points and their SAEs."""

    HEADING = "Model and features"

    model: Annotated[
        str,
        Option(help="Reference model: gemma-2-2b-it or the like, a hub id or a local folder."),
    ]
    layer: Annotated[
        list[int],
        Option(
            help="Decoder layer of the hook point, from 0. Repeat for several. Without one the "
            "store has no features and serves every --constraint but features."
        ),
    ] = field(default_factory=list)
    site: Annotated[
        list[str],
        Option(
            help="resid_post (the layer's output) or mlp_out. Give it once for all layers, or once "
            "per --layer, in the same order."
        ),
    ] = field(default_factory=lambda: ["resid_post"])
    sae: Annotated[
        list[str],
        Option(
            help="SAE of each layer: a sae-lens release/id (see fpo saes MODEL), a folder of "
            "sae-lens or Gemma Scope 2, or a Gemma Scope params.npz. Default for models of the "
            "shape of Gemma 2 or 3: Gemma Scope's SAE of width 16k, or the smallest there is.",
        ),
    ] = field(default_factory=list)
    dtype: Annotated[
        Literal["bfloat16", "float32", "float16"], Option(help="Dtype of the model.")
    ] = "bfloat16"
    load_in_4bit: Annotated[
        bool,
        Option(
            "--load-in-4bit",
            help="Linear layers in 4 bits, for fpo train --load-in-4bit. Needs the extra qlora.",
        ),
    ] = False
    trust_remote_code: Annotated[bool, TRUST_REMOTE_CODE] = False
    allow: Annotated[
        list[str],
        Option(
            help="Resume the store even if this setting differs from it: dtype or kernel. "
            "With --reference-logps, dtype permits values of another dtype. Repeatable."
        ),
    ] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The preference pairs and how they become tokens."""

    HEADING = "Data"

    data: Annotated[
        list[str],
        Option(
            metavar="SOURCE[:WEIGHT]",
            help="Preference pairs: a hub id (OWNER/NAME, OWNER/NAME@REVISION), a JSONL, JSON, CSV "
            "or Parquet file, the first three also .gz or .zst, a folder of Parquet files, or a "
            "saved data set. docs/data.md has the layouts of rows. Repeat for a mixture, in "
            "proportion to the weights if there are any. Default: UltraFeedback, binarised.",
        ),
    ] = field(default_factory=lambda: [DEFAULT_DATA])
    split: Annotated[
        list[str],
        Option(
            help="Split of a data set, once for all or once per --data. Default: train_prefs for "
            "UltraFeedback, else train."
        ),
    ] = field(default_factory=list)
    config_name: Annotated[
        list[str],
        Option(
            help="Configuration (subset) of a data set on the hub, once for all or once per --data."
        ),
    ] = field(default_factory=list)
    limit: Annotated[int | None, Option(min=1, help="Read only this many rows of each --data.")] = (
        None
    )
    score_margin: Annotated[
        float,
        Option(
            min=0.0,
            help="Of rows with several scored answers, the best is chosen and the worst rejected; "
            "drop those whose scores differ by less.",
        ),
    ] = 0.0
    deduplicate: Annotated[
        bool,
        Option("--deduplicate", help="Of pairs with equal prompt and answers keep the first."),
    ] = False
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
    max_length: Annotated[
        int,
        Option(
            min=2, help="Maximum tokens of prompt plus response; longer responses are truncated."
        ),
    ] = 2048
    max_prompt_length: Annotated[
        int,
        Option(
            min=1,
            help="Maximum tokens of a prompt; pairs with a longer one are dropped and counted.",
        ),
    ] = 1024


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """What is stored of every response."""

    HEADING = "What is stored"

    top_k: Annotated[
        str, Option(help="Number of largest pooled features to store per response, or all.")
    ] = "256"
    keep: Annotated[
        str | None,
        Option(
            metavar="FILE",
            help="Store the features that this weights file names for every response, so that "
            "their distance is exact.",
        ),
    ] = None
    value_dtype: Annotated[
        Literal["float32", "float16"], Option(help="Dtype of stored feature values.")
    ] = "float32"
    distributions: Annotated[
        str,
        Option(
            metavar="N",
            help="Store the reference's N likeliest next tokens at every scored position, or all: "
            "what tdpo1, tdpo2, simpo_kl, any --constraint kl, --measure-kl and fpo eval's KL read "
            "in place of the reference, for a lower bound of the KL. 64 is a good number: 516 "
            "bytes for each token of a response, before compression; a million pairs of 2 x 300 "
            "take 310 GB. docs/caching.md says which method needs what.",
        ),
    ] = "0"
    distribution_dtype: Annotated[
        Literal["float32", "float16"],
        Option(help="Dtype of these tokens' log-probabilities; float16 is rounded."),
    ] = "float32"
    drop_non_finite: Annotated[
        bool,
        Option(
            "--drop-non-finite",
            help="Store no reference values for pairs whose scores or features are NaN or "
            "infinite; training skips them.",
        ),
    ] = False
    drop_crashing: Annotated[
        bool,
        Option(
            "--drop-crashing",
            help="With several workers: store no reference values for a pair that ends its worker "
            "three times; training skips it.",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class _Hardware:
    """Where the model runs."""

    HEADING = "Hardware and memory"

    device: Annotated[str | None, DEVICE] = None
    workers: Annotated[
        int | None,
        Option(
            min=1,
            help="Score in so many processes, each with a GPU of its own, or with its share of the "
            "CPUs. Default: one for each GPU. More than one need the extra ray.",
        ),
    ] = None
    ray: Annotated[
        str | None,
        Option(
            metavar="ADDRESS",
            help="Score on this Ray cluster, on any number of hosts: the HOST:PORT of its head, "
            "or auto for the one that this host belongs to.",
        ),
    ] = None
    packed_length: Annotated[int | None, Option(min=1, help=PACKED_LENGTH_HELP)] = None
    block: Annotated[
        int,
        Option(
            min=1,
            help="Pairs per block, the unit of work. A crash loses those in progress: two, or two "
            "of each worker.",
        ),
    ] = 1024


@dataclass(frozen=True, kw_only=True)
class _Output:
    """What is written."""

    HEADING = "Output"

    out: Annotated[
        str, Option(help="The store to write: a folder, or a URL such as s3://BUCKET/NAME.")
    ] = "ref.zarr"
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing store.")] = False

    repair: Annotated[
        bool, Option("--repair", help="Find damage in the store and score those blocks again.")
    ] = False


# A dataclass takes the fields of its last base first.
@dataclass(frozen=True, kw_only=True)
class CacheConfig(_Output, _Hardware, ImportSettings, _Stored, DataSettings, _Model):
    """Run the frozen reference model and its SAE once and write the store that training reads.

    Run the same command again to resume. With several GPUs all are used; see --workers and --ray.
    """

    def __post_init__(self) -> None:
        check_values(self)
        if self.repair and self.overwrite:
            raise UserError("--repair keeps what --overwrite would delete", "use one of the two")
        if unknown := [kind for kind in self.site if kind not in ("resid_post", "mlp_out")]:
            raise UserError(f"--site {unknown[0]} is unknown", "use resid_post or mlp_out")
        if not self.layer and (self.sae or self.site != ["resid_post"]):
            raise UserError("--sae and --site need a --layer", "name one, such as --layer 25")
        if self.keep and not self.layer:
            raise UserError("--keep needs a --layer", "name one, such as --layer 25")
        if len(self.site) not in (1, len(self.layer)):
            raise UserError(
                f"--site is used {len(self.site)} times for {len(self.layer)} layers",
                "use --site once for all layers, or once for each",
            )
        if not self.data:
            raise UserError("--data has no value", "set one, or leave it out")
        for flag, values in (("--split", self.split), ("--config-name", self.config_name)):
            if len(values) not in (0, 1, len(self.data)):
                raise UserError(
                    f"{flag} is used {len(values)} times for {len(self.data)} data sets",
                    f"use {flag} once for all, or once for each --data",
                )
        if self.sae and len(self.sae) != len(self.layer):
            raise UserError(
                f"--sae is used {len(self.sae)} times for {len(self.layer)} layers",
                "use --sae once for each --layer, in the same order",
            )
        if self.top_k != "all" and not (self.top_k.isdecimal() and int(self.top_k) > 0):
            raise UserError(
                f"--top-k {self.top_k} is neither a positive number nor 'all'",
                "the default is 256; all makes the feature distance exact",
            )
        if self.distributions.isdecimal():
            object.__setattr__(self, "distributions", str(int(self.distributions)))
        elif self.distributions != "all":
            raise UserError(
                f"--distributions {self.distributions} is neither a number nor 'all'",
                "64 is a good one; all makes the KL exact",
            )

        check_import(self)
        if self.ray or (self.workers or 1) > 1:
            check_device_of_many(self.device, "Ray gives each worker")

    @property
    def sites(self) -> list[tuple[int, str]]:
        """(layer, kind) of every site, in the order of --layer."""
        kinds = self.site * len(self.layer) if len(self.site) == 1 else self.site
        return list(zip(self.layer, kinds, strict=True))
