"""The file formats of Gemma Scope (params.npz) and Gemma Scope 2 (config.json and
params.safetensors), for sae-lens's disk loader."""

import math
import re
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from safetensors import safe_open
from torch import Tensor

from fpocli.system.json_yaml import read_json

# Trained weights hardly compress; an archive of zeros does a thousandfold.
_MOST_EXPANSION = 50


def check_npz(path: Path) -> None:
    """Check the arrays' headers against the sizes of the archive's entries, before reading any.

    Raises:
        ValueError: an entry is not an array of floats or has another length than its header says,
            or the archive expands more than trained weights do.
    """
    import numpy as np

    with ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
        if size > _MOST_EXPANSION * path.stat().st_size:
            raise ValueError(f"its {path.stat().st_size:,} bytes expand to {size:,}")
        for entry in archive.infolist():
            with archive.open(entry) as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError(f"{entry.filename} has an unknown version of the format")
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                length = file.tell() + math.prod(shape) * dtype.itemsize
            if dtype.kind != "f" or length != entry.file_size:
                raise ValueError(f"{entry.filename} is not the {dtype} of shape {shape} it says")


def read_npz(
    path: Any, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """sae-lens's disk loader for a local Gemma Scope params.npz."""
    import numpy as np

    with Path(path).open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        state = {name: torch.tensor(arrays[name]) for name in arrays}
    return _jumprelu(state, device, cfg_overrides)


def download_scope_2(release: str, sae_id: str) -> Path | None:
    """The folder of a Gemma Scope 2 SAE in the hub's cache, downloaded if necessary.

    sae-lens asks the hub for the tensors' shapes even where everything is in the cache, so its own
    loader does not work offline.

    Args:
        release, sae_id: of sae-lens.

    Returns:
        the folder; None if the SAE is not of Gemma Scope 2, or its repository has no config.json.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory().get(release)
    if known is None or known.conversion_func != "gemma_3" or sae_id not in known.saes_map:
        return None
    folder = known.saes_map[sae_id]
    try:
        hf_hub_download(known.repo_id, f"{folder}/config.json")
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None
    return Path(hf_hub_download(known.repo_id, f"{folder}/params.safetensors")).parent


def is_scope_2(path: Path) -> bool:
    """Whether a folder holds an SAE of Gemma Scope 2."""
    return (path / "params.safetensors").is_file() and not (path / "cfg.json").exists()


def read_scope_2(
    path: Any, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """sae-lens's disk loader for a local folder of Gemma Scope 2.

    Raises:
        ValueError: it is not an SAE of one place, such as a transcoder.
    """
    about = read_json(Path(path) / "config.json")
    if not isinstance(about, dict) or about.get("architecture") != "jump_relu":
        raise ValueError("config.json does not describe a jump_relu SAE")
    if about.get("hf_hook_point_out") not in (None, about.get("hf_hook_point_in")):
        raise ValueError("it is a transcoder, which does not encode the states it reads alone")
    with safe_open(Path(path) / "params.safetensors", "pt") as weights:
        names = weights.keys()
        state = {name: weights.get_tensor(name) for name in names}
    # model.layers.12.output is what transformers' module model.layers.12 returns.
    hook = str(about.get("hf_hook_point_in", "")).removesuffix(".output")
    named = {"hook_name": hook, "model_name": about.get("model_name")}
    return _jumprelu(state, device, named | (cfg_overrides or {}))


def _jumprelu(
    arrays: dict[str, Tensor], device: str, cfg_overrides: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    # Some releases write w_enc and w_dec.
    state = {re.sub("^w_", "W_", name): array.float().to(device) for name, array in arrays.items()}
    d_in, d_sae = state["W_enc"].shape
    config = {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": device,
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
    }
    return config | (cfg_overrides or {}), state
