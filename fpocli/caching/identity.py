"""What a store is made from: everything that decides its content."""

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fpocli.config import MAY_DIFFER, CacheConfig
from fpocli.data.pair_tokenizer import PairTokenizer
from fpocli.data.sources import Source, identity_of, split_weight
from fpocli.features.encoder import SparseEncoder
from fpocli.features.weights import load_feature_weights
from fpocli.model.attention import choose_kernel
from fpocli.model.four_bit import NF4
from fpocli.store.distribution_rows import Distributions
from fpocli.store.place import place_of
from fpocli.store.reader import Store
from fpocli.system.errors import UserError, differences
from fpocli.system.model_folder import ModelFolder


def identify(
    config: CacheConfig,
    device: torch.device,
    folder: ModelFolder,
    model_config: Any,
    tokenizer: PairTokenizer,
    sources: list[Source],
    encoders: dict[str, SparseEncoder],
    imported: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The attributes of docs/format.md that the store's fingerprint covers."""
    return {
        "data": identity_of(sources),
        "tokenizer": tokenizer.identity,
        "limits": {
            "max_length": config.max_length,
            "max_prompt_length": config.max_prompt_length,
            "truncation_side": "right",
        },
        "model": {
            "source": folder.source,
            "revision": folder.revision,
            "architecture": (model_config.architectures or [model_config.model_type])[0],
            "hash": folder.weights_hash(),
            "dtype": config.dtype,
            # Of the program that computed them nothing is known.
            "attention": "imported" if imported else choose_kernel(device),
            **({"imported": imported} if imported else {}),
            **({"quantization": NF4} if config.load_in_4bit else {}),
        },
        "sites": _describe_sites(config, encoders),
        "block": config.block,
        **_describe_distributions(config, model_config),
    }


def check_distributions(config: CacheConfig, model_config: Any) -> None:
    """Refuse more tokens of a distribution than there are.

    Raises:
        UserError: --distributions is not below the size of the vocabulary.
    """
    vocabulary = model_config.vocab_size
    if config.distributions != "all" and int(config.distributions) >= vocabulary:
        raise UserError(
            f"--distributions {config.distributions}: the vocabulary of {config.model} has "
            f"{vocabulary:,} tokens",
            "for all of them use --distributions all, or a smaller number; 64 is a good one",
        )


def _describe_distributions(config: CacheConfig, model_config: Any) -> dict[str, Any]:
    """Empty without --distributions, so that the fingerprint is then as it was before them."""
    vocabulary = model_config.vocab_size
    n = vocabulary if config.distributions == "all" else int(config.distributions)
    if n == 0:
        return {}
    about = Distributions(n, config.distribution_dtype, vocabulary)
    return {"distributions": about._asdict()}


def local_paths(config: CacheConfig) -> dict[str, dict[str, str]]:
    """Where local files are that the store is made from: absolute, and relative to the store.

    Returns:
        by name (model, data, or data.0 and so on, and the sites for their SAEs); hub ids are left
        out. To a bucket nothing is relative, so both are absolute.
    """
    names = [f"layer_{layer}.{kind}" for layer, kind in config.sites]
    data = [split_weight(source)[0] for source in config.data]
    sources = {"model": config.model}
    # Of a mixture each source has a place of its own.
    sources |= {f"data.{i}": path for i, path in enumerate(data)} if data[1:] else {"data": data[0]}
    sources |= dict(zip(names, config.sae, strict=True))
    store = place_of(config.out).name
    return {
        name: {
            "absolute": str(path),
            "relative": os.path.relpath(path, store.resolve())
            if isinstance(store, Path)
            else str(path),
        }
        for name, source in sources.items()
        if Path(source).exists()
        for path in [Path(source).resolve()]
    }


def check_same_settings(config: CacheConfig, store: Store, identity: dict[str, Any]) -> None:
    """Refuse a store that was made from something else, except for what --allow names.

    Raises:
        UserError: it lists the differences.
    """
    stored: dict[str, Any] = {name: store.meta.get(name) for name in {*identity, "distributions"}}
    allowed = {MAY_DIFFER[name]: identity["model"][MAY_DIFFER[name]] for name in config.allow}
    stored |= {"model": stored["model"] | allowed}
    if other := differences(stored, _as_spelled_in(store, identity, local_paths(config))):
        raise UserError(
            f"{store.path} was made with other settings: {other}",
            "use the flags it was made with, another --out, or --overwrite",
        )


def _as_spelled_in(
    store: Store, identity: dict[str, Any], paths: dict[str, dict[str, str]]
) -> dict[str, Any]:
    """The identity, with the store's own spelling of paths to the same files."""
    known = store.meta.get("paths", {})
    same = [
        name for name in paths if known.get(name, {}).get("absolute") == paths[name]["absolute"]
    ]
    spelled = dict(identity)
    for name in same:
        if name == "model":
            for part in ("model", "tokenizer"):
                spelled[part] = identity[part] | {"source": store.meta[part]["source"]}
        elif name == "data":
            spelled["data"] = identity["data"] | {"source": store.meta["data"]["source"]}
        elif name.startswith("data."):
            number = int(name.removeprefix("data."))
            parts = list(spelled["data"]["sources"])
            known_as = store.meta["data"]["sources"][number]["source"]
            parts[number] = parts[number] | {"source": known_as}
            spelled["data"] = spelled["data"] | {"sources": parts}
        elif name in store.sites:
            site = spelled["sites"][name]
            sae = site["sae"] | {"source": store.sites[name]["sae"]["source"]}
            spelled["sites"] = spelled["sites"] | {name: site | {"sae": sae}}
    return spelled


def describe_origin(config: CacheConfig, encoders: dict[str, SparseEncoder]) -> dict[str, Any]:
    """Further attributes of docs/format.md, which say where the store comes from and decide nothing
    of its content."""
    named = {site: encoder.neuronpedia for site, encoder in encoders.items() if encoder.neuronpedia}
    return {
        "writer": {"fpo": version("fpocli"), "zarr": version("zarr"), "torch": torch.__version__},
        "paths": local_paths(config),
        **({"neuronpedia": named} if named else {}),
    }


def _describe_sites(
    config: CacheConfig, encoders: dict[str, SparseEncoder]
) -> dict[str, dict[str, Any]]:
    widths = {name: encoder.features for name, encoder in encoders.items()}
    keep = load_feature_weights(config.keep, widths) if config.keep else {}
    described: dict[str, dict[str, Any]] = {}
    for (layer, kind), source, (name, encoder) in zip(
        config.sites, config.sae, encoders.items(), strict=True
    ):
        k = encoder.features if config.top_k == "all" else int(config.top_k)
        described[name] = {
            "layer": layer,
            "kind": kind,
            "sae": {
                "source": source,
                "architecture": encoder.architecture,
                "hash": encoder.hash(),
                "settings": encoder.settings,
            },
            "d_sae": encoder.features,
            "k": min(k, encoder.features),
            "value_dtype": config.value_dtype,
            "pooling": "mean over the positions that predict the response",
        }
        if name in keep and len(keep[name].named):
            described[name]["keep"] = keep[name].named.tolist()
    return described
