"""Pre-trained SAEs: a sae-lens release, or a local folder or file -> an encoder."""

import lzma
import pickle
import re
import struct
import tokenize
import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fpocli.features.encoder import SparseEncoder, fold_decoder_norm
from fpocli.features.gemma_scope import (
    check_npz,
    download_scope_2,
    is_scope_2,
    read_npz,
    read_scope_2,
)
from fpocli.system.errors import UserError
from fpocli.system.hub import hub_errors
from fpocli.system.json_yaml import read_json

# What a truncated, altered or foreign file raises: errors of the readers, and of sae-lens, which
# uses a configuration unchecked.
_BROKEN = (
    OSError, EOFError, BadZipFile, zlib.error, lzma.LZMAError, struct.error, SafetensorError,
    pickle.UnpicklingError, MemoryError, ValueError, TypeError, LookupError, AttributeError,
    ArithmeticError, RuntimeError, AssertionError, SyntaxError, tokenize.TokenError,
)  # fmt: skip


def load_encoder(source: str, device: torch.device) -> SparseEncoder:
    """Load an SAE.

    Args:
        source: a sae-lens release/id, a folder of sae-lens or Gemma Scope 2, or a Gemma Scope
            params.npz.
        device: where it runs, in float32.

    Raises:
        UserError: it does not exist, or is not an SAE that fpo supports.
    """
    return SparseEncoder(_load(source, device))


def load_decoder(source: str, device: torch.device) -> Tensor:
    """W_dec of an SAE, float32 [m, d], which turns the features of `load_encoder` into states."""
    return load_sae(source, device)[1]


def load_sae(source: str, device: torch.device) -> tuple[SparseEncoder, Tensor]:
    """Both halves of an SAE: those of `load_encoder` and `load_decoder`."""
    sae = _load(source, device)
    fold_decoder_norm(sae)
    # Held before the encoder, which has no use for it, gives it up.
    decoder = sae.W_dec.detach()
    return SparseEncoder(sae), decoder


def _load(source: str, device: torch.device) -> Any:
    from sae_lens import SAE

    path = Path(source)
    name = str(device)
    try:
        if path.is_dir() and is_scope_2(path):
            sae = SAE.load_from_disk(source, device=name, dtype="float32", converter=read_scope_2)
        elif path.is_dir():
            _check_folder(path)
            sae = SAE.load_from_disk(source, device=name, dtype="float32")
        elif path.suffix == ".npz":
            if not path.is_file():
                raise UserError(f"the SAE {source} does not exist", "check the path of --sae")
            check_npz(path)
            sae = SAE.load_from_disk(source, device=name, dtype="float32", converter=read_npz)
        else:
            release, sae_id = _split_release(source)
            with hub_errors(f"the SAE {source}"):
                if folder := download_scope_2(release, sae_id):
                    sae = SAE.load_from_disk(
                        folder, device=name, dtype="float32", converter=read_scope_2
                    )
                else:
                    sae = SAE.from_pretrained(release, sae_id, device=name)
        # Settings that do not fit the parameters, such as a k above m, fail here.
        with torch.no_grad():
            sae.encode(torch.zeros(1, sae.cfg.d_in, device=device))
    except _BROKEN as error:
        raise UserError(
            f"the SAE {source} cannot be loaded: {error}",
            "name a sae-lens release/id, a folder with cfg.json and sae_weights.safetensors or "
            "with config.json and params.safetensors (Gemma Scope 2), or a Gemma Scope params.npz",
        ) from error
    return sae


def _check_folder(path: Path) -> None:
    """Check cfg.json against the header of the weights, before an SAE is built.

    Raises:
        ValueError: their sizes differ.
    """
    config = read_json(path / "cfg.json")
    if not isinstance(config, dict):
        raise ValueError("cfg.json is not a JSON object")
    with safe_open(path / "sae_weights.safetensors", "pt") as weights:
        shape = weights.get_slice("W_enc").get_shape()
    if [config.get("d_in"), config.get("d_sae")] != shape:
        raise ValueError(
            f"cfg.json has d_in {config.get('d_in')} and d_sae {config.get('d_sae')}, the weights "
            f"have W_enc {shape}"
        )


def check_encoder(encoder: SparseEncoder, source: str, site: Any, width: int) -> None:
    """Refuse an SAE that was not trained for this model and hook point.

    Args:
        encoder: the SAE.
        source: its name in messages.
        site: where its features are to be taken.
        width: d of the model.

    Raises:
        UserError: its width or its hook point is another.
    """
    if encoder.width != width:
        raise UserError(
            f"the SAE {source} reads states of width {encoder.width}, the model's are {width} wide",
            "name an SAE that was trained on this model",
        )
    hook = str(encoder.sae.cfg.metadata.hook_name or "")
    # Files without a name, such as a params.npz, are taken at the user's word.
    if hook and _site_of(hook) != (site.layer, site.kind):
        known = _site_of(hook)
        raise UserError(
            f"the SAE {source} was trained at {hook}, which is not the hook point {site}",
            f"use --layer {known[0]} --site {known[1]}, or another --sae"
            if known
            else "use an SAE of the residual stream after a layer, or of the MLP's output",
        )


def _site_of(hook: str) -> tuple[int, str] | None:
    """Layer and kind of a hook point by its name in TransformerLens (blocks.L.hook_resid_post) or
    transformers (model.layers.L); None for one that is not a site of fpo."""
    named = re.fullmatch(r"(?:.*\.)?(?:blocks|layers|h)\.(\d+)(.*)", hook)
    if named is None:
        return None
    layer, place = int(named[1]), named[2]
    if place == ".hook_resid_pre" and layer > 0:
        # What enters a layer is what left the one before.
        return layer - 1, "resid_post"
    kinds = {
        "": "resid_post",
        ".hook_resid_post": "resid_post",
        ".hook_mlp_out": "mlp_out",
        # In transformers' Gemma-2 and Gemma-3.
        ".post_feedforward_layernorm": "mlp_out",
    }
    return (layer, kinds[place]) if place in kinds else None


def _split_release(source: str) -> tuple[str, str]:
    """Split into a release of sae-lens and an id; an unknown release is a hub repository."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    first, _, rest = source.partition("/")
    if first not in get_pretrained_saes_directory():
        second, _, rest = rest.partition("/")
        first = f"{first}/{second}"
    if not rest:
        raise UserError(
            f"the SAE {source} is neither a file, a folder nor a sae-lens release/id",
            "an example: gemma-scope-2b-pt-res-canonical/layer_25/width_16k/canonical",
        )
    return first, rest
