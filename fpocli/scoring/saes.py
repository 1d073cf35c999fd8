"""SAEs for a command: by default, as named, or those that a store was made with."""

from typing import Any

import torch

from fpocli.features.encoder import SparseEncoder
from fpocli.features.known_saes import default_saes
from fpocli.features.pretrained import check_encoder, load_encoder
from fpocli.features.site import Site
from fpocli.scoring.loading import find_local
from fpocli.store.reader import Store
from fpocli.system.console import progress, say
from fpocli.system.errors import UserError
from fpocli.system.model_folder import ModelFolder


def choose_default_saes(folder: ModelFolder, model_config: Any, sites: list[Site]) -> list[str]:
    """The default SAE of each site, which is printed; as `default_saes`."""
    with progress("Looking up SAEs", None):
        found, model = default_saes(folder, model_config, sites)
    of = "" if model == folder.source else f", the base model whose shape {folder.source} has"
    say(f"SAE {', '.join(found)}, trained on {model}{of}")
    return found


def load_saes(
    sources: list[str], sites: list[Site], width: int, device: torch.device
) -> dict[str, SparseEncoder]:
    """The SAEs of sites, checked.

    Args:
        sources: where they are, in the order of the sites.
        sites: where they read.
        width: d of the model.
        device: where they run.

    Raises:
        UserError: one cannot be loaded, or is not of this site or width.
    """
    encoders = {}
    with progress("Loading SAEs", len(sites)) as bar:
        for site, source in zip(sites, sources, strict=True):
            encoders[str(site)] = encoder = load_encoder(source, device)
            check_encoder(encoder, source, site, width)
            bar.advance()
    return encoders


def sae_sources(store: Store, sites: list[Site], named: list[str]) -> dict[str, str]:
    """Where the SAE of each site is: as named, in the order of the sites, or where it was.

    Raises:
        UserError: a local SAE is not found, or too few or too many are named.
    """
    names = [str(site) for site in sites]
    sources = named or [
        find_local(store, name, store.sites[name]["sae"]["source"], "--sae") for name in names
    ]
    if len(sources) != len(names):
        raise UserError(
            f"--sae is used {len(sources)} times for {len(names)} sites",
            f"use --sae once for each of {', '.join(names)}" if names else "leave it out",
        )
    return dict(zip(names, sources, strict=True))


def load_encoders(
    store: Store, sites: list[Site], named: list[str], width: int, device: torch.device
) -> dict[str, SparseEncoder]:
    """The SAE of each site.

    Args:
        store: the store.
        sites: of the store.
        named: where the SAEs are now, in the order of the sites; empty is where they were.
        width: d of the model.
        device: where they run.

    Raises:
        UserError: one is missing, or is not the one that the store was made with.
    """
    sources = list(sae_sources(store, sites, named).values())
    encoders = load_saes(sources, sites, width, device)
    for source, (site, encoder) in zip(sources, encoders.items(), strict=True):
        if not is_sae_of(store.meta, site, encoder):
            raise UserError(
                f"the SAE {source} is not the one that {store.path} was made with at {site}",
                "name the right one with --sae, or cache again",
            )
    return encoders


def is_sae_of(meta: dict[str, Any], site: str, encoder: SparseEncoder) -> bool:
    """Whether a store was made with this SAE.

    Args:
        meta: attributes of the store.
        site: where it reads.
        encoder: the SAE.
    """
    about = meta["sites"][site]["sae"]
    # Version 1.0 does not store the settings.
    same = about.get("settings", encoder.settings) == encoder.settings
    return same and encoder.hash() == about["hash"]
