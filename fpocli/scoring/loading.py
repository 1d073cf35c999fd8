"""The sites, reference and tokeniser that a store was made with: found again and checked."""

import os
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fpocli.data.tokenizer import load_tokenizer, vocabulary_hash
from fpocli.features.site import Site
from fpocli.model.four_bit import require_bitsandbytes
from fpocli.model.language_model import FrozenReference, load_model
from fpocli.store.reader import Store
from fpocli.system.errors import UserError
from fpocli.system.model_folder import ModelFolder, find_model


def sites_of(store: Store, named: list[str]) -> list[Site]:
    """The sites of a store that a command uses, in the store's order.

    Args:
        store: the store.
        named: their names; empty for all.

    Raises:
        UserError: the store does not have one of them.
    """
    for name in named:
        if name not in store.sites:
            raise UserError(
                f"{store.path} has no features at {name}",
                f"it has {', '.join(store.sites)}" if store.sites else "cache again with --layer",
            )
    return [Site.parse(name) for name in store.sites if name in named or not named]


def one_site(store: Store, name: str | None) -> Site:
    """The site of a store that a command looks at.

    Args:
        store: the store.
        name: of the site; None for the store's only one.

    Raises:
        UserError: the store does not have it, or has several and none is named.
    """
    sites = sites_of(store, [name] if name else [])
    if not sites:
        raise UserError(f"{store.path} has no features", "cache again with --layer")
    if len(sites) > 1:
        raise UserError(
            f"{store.path} has several sites", f"name one with --at: {', '.join(store.sites)}"
        )
    return sites[0]


def check_k(store: Store, sites: list[Site], k: int) -> None:
    """Refuse to compare more features than a store has.

    Raises:
        UserError: k is larger than K at a site whose features are not all stored.
    """
    for site in map(str, sites):
        about = store.sites[site]
        if k > about["k"] < about["d_sae"]:
            raise UserError(
                f"--k {k} compares more features than {store.path} has of {site}: {about['k']}",
                f"use --k {about['k']} or less, or cache again with a larger --top-k",
            )


def find_reference(
    store: Store, name: str | None, *, trust_remote_code: bool = False
) -> ModelFolder:
    """The model that a store was made with, in 4 bits if it was.

    Args:
        store: the store.
        name: where the model is now; None is where it was.
        trust_remote_code: whether its Python code may be run.

    Raises:
        UserError: it is not found, its weights differ, or bitsandbytes is not installed, which 4
            bits need.
    """
    about = store.meta["model"]
    folder = find_model(
        name or find_model_of(store, "--reference"),
        revision=None if name else about["revision"],
        trust_remote_code=trust_remote_code,
    )
    if folder.weights_hash() != about["hash"]:
        raise UserError(
            f"the weights of {folder.source} are not those that {store.path} was made with",
            "name the store's reference model, or cache again with this one",
        )
    if store.in_4bit:
        require_bitsandbytes()
    return replace(folder, load_in_4bit=store.in_4bit)


def find_local(store: Store, name: str, source: str, flag: str, *, was_local: bool = False) -> str:
    """Where a file or folder is that the store was made from.

    Args:
        store: the store.
        name: in the attribute `paths`: model, or a site for its SAE.
        source: as it was named when the store was made.
        flag: of the command, which names its new place.
        was_local: whether the source was a path, if the store has no attribute `paths`.

    Returns:
        its path, or the source if that was not a path.

    Raises:
        UserError: it was a path and no longer exists.
    """
    known = store.meta.get("paths", {}).get(name)
    if known is None and not was_local:
        return source
    places = [Path(source)]
    if known:
        folder = store.path.resolve() if isinstance(store.path, Path) else Path()
        relative = Path(os.path.normpath(folder / known["relative"]))
        places = [Path(known["absolute"]), relative, *places]
    for place in places:
        if place.exists():
            return str(place)
    raise UserError(
        f"{source}, from which {store.path} was made, is not found at "
        f"{' or '.join(dict.fromkeys(map(str, places)))}",
        f"name its new place with {flag}",
    )


def find_model_of(store: Store, flag: str) -> str:
    """The folder or hub id of the model that a store was made with.

    Args:
        store: the store.
        flag: of the command, which names the model's new place.

    Raises:
        UserError: it was a local folder and is not found.
    """
    about = store.meta["model"]
    # A model from the hub has a revision.
    if about["revision"] is not None:
        return about["source"]
    return find_local(store, "model", about["source"], flag, was_local=True)


def load_reference(
    folder: ModelFolder,
    sites: list[Site],
    dtype: torch.dtype,
    device: torch.device,
    partitioned: AbstractContextManager | None = None,
) -> FrozenReference:
    """The frozen reference, to be run alongside a policy.

    Args:
        folder: from `find_reference`.
        sites: where hidden states are taken.
        dtype: the policy's; otherwise the KL of equal weights would not be 0.
        device: where it runs.
        partitioned: as `load_network` takes it.
    """
    network = load_model(folder, sites, dtype, device, partitioned).network
    return FrozenReference(network, sites)


def tokenizer_of(store: Store, folder: ModelFolder) -> Any:
    """A model's tokeniser with the chat template of the store.

    Raises:
        UserError: it is not the tokeniser that the store was made with.
    """
    tokenizer = load_tokenizer(folder)
    if vocabulary_hash(tokenizer) != store.meta["tokenizer"]["vocabulary"]:
        raise UserError(
            f"the tokeniser of {folder.source} is not the one that {store.path} was made with",
            "use a model with the same tokeniser, or cache again with this one",
        )
    tokenizer.chat_template = store.meta["tokenizer"]["chat_template"]["text"]
    return tokenizer


def find_tokenizer(store: Store, name: str | None) -> Any:
    """The tokeniser that a store was made with; no weights are needed.

    Args:
        store: the store.
        name: where the model is now; None is where it was.

    Raises:
        UserError: it is not found, or is another one.
    """
    revision = None if name else store.meta["tokenizer"]["revision"]
    source = name or find_model_of(store, "--model")
    return tokenizer_of(store, find_model(source, revision=revision, weights=False))
