"""The reference, the tokeniser and the SAEs of a store, found again and held to what it says."""

from typing import Any

import torch

from fpocli.data.tokenizer import load_tokenizer, vocabulary_hash
from fpocli.features.encoder import SparseEncoder
from fpocli.features.pretrained import check_encoder, load_encoder
from fpocli.features.site import Site
from fpocli.model.language_model import FrozenReference, load_model
from fpocli.store.reader import Store
from fpocli.system.errors import UserError
from fpocli.system.model_folder import ModelFolder, find_model


def sites_of(store: Store) -> list[Site]:
    """The sites that a store has features of."""
    return [Site.parse(name) for name in store.sites]


def check_k(store: Store, k: int) -> None:
    """Refuse to compare more features than a store holds.

    Raises:
        UserError: k is larger than K at a site that does not hold all its features.
    """
    for site, about in store.sites.items():
        if k > about["k"] < about["d_sae"]:
            raise UserError(
                f"--k {k} compares more features than the {about['k']} that {store.path} holds at "
                f"{site}",
                f"give --k {about['k']} or less, or cache again with a larger --top-k",
            )


def find_reference(
    store: Store, name: str | None, *, trust_remote_code: bool = False
) -> ModelFolder:
    """The model that a store was made with.

    Args:
        store: the store.
        name: where the model is now; None is where the store says.
        trust_remote_code: whether its own Python code may be run; what a store says is no reason.

    Raises:
        UserError: it is not there, or its weights are others.
    """
    about = store.meta["model"]
    folder = find_model(
        name or about["source"],
        revision=None if name else about["revision"],
        trust_remote_code=trust_remote_code,
    )
    if folder.weights_hash() != about["hash"]:
        raise UserError(
            f"the weights of {folder.source} are not those {store.path} was made with",
            "name the store's reference model, or cache again with this one",
        )
    return folder


def load_reference(
    folder: ModelFolder, sites: list[Site], dtype: torch.dtype, device: torch.device
) -> FrozenReference:
    """The frozen reference, to be run beside a policy.

    Args:
        folder: from `find_reference`.
        sites: where hidden states are taken.
        dtype: the policy's, or the KL is not 0 where both have the same weights.
        device: where it runs.
    """
    return FrozenReference(load_model(folder, sites, dtype, device).network, sites)


def tokenizer_of(store: Store, folder: ModelFolder) -> Any:
    """A model's tokeniser with the store's template.

    Raises:
        UserError: it is not the tokeniser the store was made with.
    """
    tokenizer = load_tokenizer(folder)
    if vocabulary_hash(tokenizer) != store.meta["tokenizer"]["vocabulary"]:
        raise UserError(
            f"the tokeniser of {folder.source} is not the one {store.path} was made with",
            "take a model of the same tokeniser, or cache again with this one",
        )
    tokenizer.chat_template = store.meta["tokenizer"]["chat_template"]["text"]
    return tokenizer


def sae_sources(store: Store, given: list[str]) -> dict[str, str]:
    """Where the SAE of each site of a store is: as given, in the store's order, or as it says."""
    sources = given or [about["sae"]["source"] for about in store.sites.values()]
    if len(sources) != len(store.sites):
        raise UserError(
            f"{len(sources)} SAEs are given for the store's {len(store.sites)} sites",
            f"give one --sae for each of {', '.join(store.sites)}",
        )
    return dict(zip(store.sites, sources, strict=True))


def load_encoders(
    store: Store, given: list[str], width: int, device: torch.device
) -> dict[str, SparseEncoder]:
    """The SAE of each site of a store.

    Args:
        store: the store.
        given: where the SAEs are now, in the store's order; empty is where the store says.
        width: d of the model.
        device: where they run.

    Raises:
        UserError: one is missing, or is not the one the store was made with.
    """
    encoders = {}
    for site, source in sae_sources(store, given).items():
        encoder = load_encoder(source, device)
        check_encoder(encoder, source, Site.parse(site), width)
        about = store.sites[site]["sae"]
        # Version 1.0 does not tell the settings.
        same = about.get("settings", encoder.settings) == encoder.settings
        if not same or encoder.hash() != about["hash"]:
            raise UserError(
                f"the SAE {source} is not the one {store.path} was made with at {site}",
                "name the right one with --sae, or cache again",
            )
        encoders[site] = encoder
    return encoders
