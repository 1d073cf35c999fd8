"""What a store is made from: everything that decides its content."""

from importlib.metadata import version
from typing import Any

import torch

from fpocli.config import MAY_DIFFER, CacheConfig
from fpocli.data.pair_tokenizer import PairTokenizer
from fpocli.data.sources import Source
from fpocli.features.encoder import SparseEncoder
from fpocli.features.gemma_scope import default_sae
from fpocli.model.attention import choose_kernel
from fpocli.store.reader import Store
from fpocli.system.errors import UserError, differences
from fpocli.system.model_folder import ModelFolder


def chosen_saes(config: CacheConfig) -> list[str]:
    """The SAE of each site: the one that is given, or the model's default."""
    return config.sae or [default_sae(config.model, layer, kind) for layer, kind in config.sites]


def identify(
    config: CacheConfig,
    device: torch.device,
    folder: ModelFolder,
    model_config: Any,
    tokenizer: PairTokenizer,
    source: Source,
    encoders: dict[str, SparseEncoder],
) -> dict[str, Any]:
    """What the store is to be made from."""
    return {
        "data": source.identity,
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
            "attention": choose_kernel(device),
        },
        "sites": _describe_sites(config, encoders),
        "block": config.block,
    }


def check_same_settings(config: CacheConfig, store: Store, identity: dict[str, Any]) -> None:
    """Refuse a store that was made from something else, but for what --allow names."""
    there = {name: store.meta[name] for name in identity}
    allowed = {MAY_DIFFER[name]: identity["model"][MAY_DIFFER[name]] for name in config.allow}
    there |= {"model": there["model"] | allowed}
    if other := differences(there, identity):
        raise UserError(
            f"{store.path} was made with other settings: {other}",
            "give the flags it was made with, another --out, or --overwrite",
        )


def writer_versions() -> dict[str, str]:
    """What writes the store."""
    return {"fpo": version("fpocli"), "zarr": version("zarr"), "torch": torch.__version__}


def _describe_sites(
    config: CacheConfig, encoders: dict[str, SparseEncoder]
) -> dict[str, dict[str, Any]]:
    described = {}
    for (layer, kind), source, (name, encoder) in zip(
        config.sites, chosen_saes(config), encoders.items(), strict=True
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
    return described
