"""Gemma Scope: the default SAEs of Gemma-2, and the format of its params.npz files."""

import math
import re
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor

from fpocli.system.errors import UserError
from fpocli.system.model_folder import SHORT_NAMES

# Hub id -> prefix of its Gemma Scope releases in sae-lens.
_RELEASES = {"google/gemma-2-2b": "gemma-scope-2b-pt", "google/gemma-2-9b": "gemma-scope-9b-pt"}
_SCOPE_SITE = {"resid_post": "res", "mlp_out": "mlp"}


def default_sae(model: str, layer: int, kind: str) -> str:
    """Gemma Scope's canonical SAE of width 16k for a site of Gemma-2, as sae-lens release/id.

    Raises:
        UserError: no SAE is known for the model.
    """
    release = _RELEASES.get(SHORT_NAMES.get(model, model))
    if release is None:
        raise UserError(
            f"no SAE is known for {model}",
            "name one with --sae: a sae-lens release/id, a sae-lens folder or a params.npz",
        )
    return f"{release}-{_SCOPE_SITE[kind]}-canonical/layer_{layer}/width_16k/canonical"


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
        # Some releases write w_enc and w_dec.
        state = {
            re.sub("^w_", "W_", name): torch.tensor(arrays[name]).float().to(device)
            for name in arrays
        }
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
