"""How large a store is, or will be: pairs, tokens and bytes, counted or extrapolated."""

import json
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from fpocli.comparison.steps import Step
from fpocli.config import CacheConfig, DataSettings
from fpocli.data.dropped import DroppedRows
from fpocli.data.layouts import read_pairs
from fpocli.data.mixture import integer_weights
from fpocli.data.pair_tokenizer import PairTokenizer
from fpocli.data.sources import sources_of
from fpocli.features.known_saes import default_saes
from fpocli.features.site import Site
from fpocli.model.network import count_parameters, read_config
from fpocli.store.distribution_rows import Distributions
from fpocli.store.reader import Store
from fpocli.store.schema import raw_bytes
from fpocli.system.console import progress
from fpocli.system.model_folder import find_model

# Rows that are tokenised to count tokens.
SAMPLE = 1000
_WIDTHS = re.compile(r"width_(\d+)([km])")


@dataclass(frozen=True)
class StoreSize:
    """What a store holds, and the model it is made from.

    Args:
        pairs: that are kept.
        tokens: of all, the prompt once.
        bytes: of the store, before compression.
        parameters: of its model.
        width: d of its model.
        features: m of each site.
        distributions: whether it holds the reference's.
    """

    pairs: int
    tokens: int
    bytes: int
    parameters: int
    width: int
    features: tuple[int, ...]
    distributions: bool


def measure_store(path: str, step: Step | None) -> StoreSize:
    """Tokens and sizes of a store that exists, or of a sample of its data.

    Args:
        path: of the store.
        step: that makes it; None if it must exist.

    Raises:
        UserError: the store, model or data cannot be read.
    """
    if step is None or step.made:
        store = Store.open(path)
        source = store.meta["model"]["source"]
        widths = tuple(about["d_sae"] for about in store.sites.values())
        folder = find_model(source, weights=False)
        about, tokens, pairs = store.meta, store.meta["tokens"], store.pairs
    else:
        config = CacheConfig(**step.settings)
        source = config.model
        if step.after and not Path(source).exists():
            # The SFT stage has not run yet; its base model has the same tokeniser and shape.
            source = str(step.after.settings["model"])
        folder = find_model(source, weights=False)
        pairs, tokens, scored = _count_pairs(config, source)
        sites = [Site(layer, kind) for layer, kind in config.sites]
        saes = config.sae
        if sites and not saes:
            saes, _ = default_saes(folder, read_config(folder), sites)
        widths = tuple(map(_features, saes))
        about = _about(config, pairs, tokens, widths)
        about |= _distributions(config, read_config(folder).vocab_size, scored)
    return StoreSize(
        pairs=pairs,
        tokens=tokens,
        bytes=raw_bytes(about),
        parameters=count_parameters(folder),
        width=read_config(folder).hidden_size,
        features=widths,
        distributions=bool(about.get("distributions")),
    )


def _about(config: CacheConfig, pairs: int, tokens: int, widths: tuple[int, ...]) -> dict[str, Any]:
    """The attributes by which a store's size is known."""
    return {
        "pairs": {"kept": pairs},
        "tokens": tokens,
        "block": config.block,
        "sites": {
            f"layer_{layer}.{kind}": {
                "k": m if config.top_k == "all" else min(int(config.top_k), m),
                "d_sae": m,
                "value_dtype": config.value_dtype,
            }
            for (layer, kind), m in zip(config.sites, widths, strict=True)
        },
    }


def _distributions(config: CacheConfig, vocabulary: int, scored: int) -> dict[str, Any]:
    """The attributes by which the size of a store's distributions is known; none without."""
    if config.distributions == "0":
        return {}
    n = vocabulary if config.distributions == "all" else int(config.distributions)
    about = Distributions(n, config.distribution_dtype, vocabulary)
    rows = dict.fromkeys(("scored", "padded", "chunk", "shard"), scored)
    return {"distributions": about._asdict(), "distribution_rows": rows}


def _count_pairs(config: CacheConfig, model: str) -> tuple[int, int, int]:
    """Pairs, tokens and scored tokens of the data, extrapolated from the first rows."""
    settings = {field.name: getattr(config, field.name) for field in fields(DataSettings)}
    return _counted(model, json.dumps(settings, sort_keys=True))


@cache
def _counted(model: str, settings: str) -> tuple[int, int, int]:
    """See `_count_pairs`; stores of a grid often differ in nothing that matters here."""
    config = CacheConfig(model=model, **json.loads(settings))
    folder = find_model(model, weights=False)
    limits = (config.max_length, config.max_prompt_length)
    counts = []
    with progress("Counting tokens", None):
        tokenizer = PairTokenizer(folder, config.chat_template, *limits, DroppedRows())
        sources = sources_of(config)
        for source in sources:
            first = source.first(SAMPLE)
            dropped = tokenizer.dropped = DroppedRows()
            sizes = [
                (1, len(pair.prompt), len(pair.chosen) + len(pair.rejected))
                for pair in tokenizer(read_pairs(first, dropped))
            ]
            if not sizes:
                raise dropped.nothing_left()
            scale = sum(1 for _ in source.rows()) / dropped.read
            counts.append([scale * sum(part) for part in zip(*sizes, strict=True)])
    # With weights, the source that has too few pairs for its share limits the others.
    parts = integer_weights(sources) or [one[0] for one in counts]
    whole = min(one[0] / part for one, part in zip(counts, parts, strict=True))
    shares = [whole * part / one[0] for one, part in zip(counts, parts, strict=True)]
    pairs, prompts, responses = (
        sum(share * count for share, count in zip(shares, column, strict=True))
        for column in zip(*counts, strict=True)
    )
    return round(pairs), round(prompts + responses), round(responses)


def _features(source: str) -> int:
    """m of an SAE, from its configuration or its name; Gemma Scope's 16k if neither tells."""
    file = Path(source) / "cfg.json"
    if file.is_file():
        return int(json.loads(file.read_text())["d_sae"])
    named = _WIDTHS.search(source)
    return int(named[1]) * {"k": 2**10, "m": 2**20}[named[2]] if named else 2**14
