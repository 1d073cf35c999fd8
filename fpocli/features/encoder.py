"""The sparse autoencoder: load one, pool its features, take the largest, and their gradient.

Shapes: n positions of one response, d model width, m features, J chosen columns.
Encoding itself is sae-lens's; only the differentiable columns are written here (method.md).
"""

import hashlib
import lzma
import math
import pickle
import re
import struct
import tokenize
import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fpocli.system.errors import UserError
from fpocli.system.json_yaml import read_json
from fpocli.system.model_folder import hub_errors

# What a file raises that is cut, altered or of another kind: the readers' own errors, and those of
# sae-lens, which takes what is in a configuration as it is.
_BROKEN = (
    OSError, EOFError, BadZipFile, zlib.error, lzma.LZMAError, struct.error, SafetensorError,
    pickle.UnpicklingError, MemoryError, ValueError, TypeError, LookupError, AttributeError,
    ArithmeticError, RuntimeError, AssertionError, SyntaxError, tokenize.TokenError,
)  # fmt: skip
# An npz of numbers shrinks little; one of nothing but zeros by a thousand.
_MOST_EXPANSION = 50
# Features of this many positions are held at once; on a CPU they should stay in its cache.
_POSITIONS, _POSITIONS_CPU = 2048, 128


class SparseEncoder:
    """A frozen SAE encoder.

    Args:
        sae: a sae-lens SAE of one of the architectures in ARCHITECTURES.
    """

    ARCHITECTURES = ("standard", "jumprelu", "gated", "topk")

    def __init__(self, sae: Any) -> None:
        self.architecture = sae.cfg.architecture()
        if self.architecture not in self.ARCHITECTURES:
            raise UserError(
                f"SAEs of the architecture {self.architecture} are not supported",
                f"supported: {', '.join(self.ARCHITECTURES)}",
            )
        _fold(sae)
        # Features need the encoder alone; half of the SAE's memory is the decoder.
        del sae.W_dec
        self.sae = sae.requires_grad_(False).eval()
        self.width: int = sae.cfg.d_in
        self.features: int = sae.cfg.d_sae

    @property
    def settings(self) -> dict[str, Any]:
        """What else decides the features, beside architecture and parameters."""
        names = ("apply_b_dec_to_input", "normalize_activations", "reshape_activations", "k")
        return {name: getattr(self.sae.cfg, name) for name in names if hasattr(self.sae.cfg, name)}

    def hash(self) -> str:
        """sha256 over the encoder's parameters, in the order of their names."""
        digest = hashlib.sha256(self.architecture.encode())
        for name, tensor in sorted(self.sae.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def chunks(states: Tensor) -> tuple[Tensor, ...]:
        """States [n, d] in parts whose features [., m] may be held at once."""
        return states.split(_POSITIONS_CPU if states.device.type == "cpu" else _POSITIONS)

    @torch.no_grad()
    def pool(self, states: Tensor) -> Tensor:
        """Mean of the features over a response's positions, without gradient.

        Args:
            states: [n, d] hidden states at the positions that predict the response.

        Returns:
            float32 [m].
        """
        total = torch.zeros(self.features, dtype=torch.float32, device=states.device)
        for chunk in self.chunks(states):
            total += self.sae.encode(chunk).sum(0)
        return total / len(states)

    def columns(self, states: Tensor, index: Tensor) -> Tensor:
        """The pooled features `index` alone, with their gradient.

        Every supported architecture is piecewise linear: an active feature is its affine
        pre-activation. So only the J columns of W_enc take part.

        Args:
            states: [n, d].
            index: [J] features, without repetition.

        Returns:
            float32 [J].
        """
        sae = self.sae
        inputs = sae.process_sae_in(states)
        weight = sae.W_enc[:, index]
        if self.architecture == "gated":
            value = inputs @ (weight * sae.r_mag[index].exp()) + sae.b_mag[index]
            active = (inputs.detach() @ weight + sae.b_gate[index] > 0) & (value > 0)
        else:
            value = inputs @ weight + sae.b_enc[index]
            if self.architecture == "jumprelu":
                active = value > sae.threshold[index].clamp(min=0)
            elif self.architecture == "topk":
                active = self._active(states, index)
            else:
                active = value > 0
        return torch.where(active, value, 0).sum(0) / len(states)

    @torch.no_grad()
    def _active(self, states: Tensor, index: Tensor) -> Tensor:
        """Which of `index` are active where that depends on all features: bool [n, J]."""
        return torch.cat([self.sae.encode(chunk)[:, index] > 0 for chunk in self.chunks(states)])


def top_k(pooled: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest features by falling value; equal ones by rising index.

    Args:
        pooled: float32 [..., m], no value below 0.
        k: at most m.

    Returns:
        index int64 and value float32, both [..., k].
    """
    m = pooled.shape[-1]
    # Non-negative floats order like their bits. The bits above the reversed index make one
    # integer that no two features share, so the order is the same on every device.
    bits = (pooled + 0.0).view(torch.int32).long()
    reversed_index = torch.arange(m - 1, -1, -1, device=pooled.device)
    key = (bits << 32 | reversed_index).topk(k, dim=-1).values
    index = m - 1 - (key & 0xFFFFFFFF)
    return index, pooled.gather(-1, index)


def load_encoder(source: str, device: torch.device) -> SparseEncoder:
    """Load an SAE.

    Args:
        source: a sae-lens release/id, a sae-lens folder, or a Gemma Scope params.npz.
        device: where it runs, in float32.

    Raises:
        UserError: nothing is there, or it is no SAE that can be used.
    """
    return SparseEncoder(_load(source, device))


def load_decoder(source: str, device: torch.device) -> Tensor:
    """W_dec of an SAE, float32 [m, d], which turns the features of `load_encoder` into states."""
    sae = _load(source, device)
    _fold(sae)
    return sae.W_dec.detach()


def _load(source: str, device: torch.device) -> Any:
    from sae_lens import SAE

    path = Path(source)
    name = str(device)
    try:
        if path.is_dir():
            _check_folder(path)
            sae = SAE.load_from_disk(source, device=name, dtype="float32")
        elif path.suffix == ".npz":
            if not path.is_file():
                raise UserError(f"the SAE {source} does not exist", "check the path given to --sae")
            _check_npz(path)
            sae = SAE.load_from_disk(
                source, device=name, dtype="float32", converter=_read_gemma_scope
            )
        else:
            release, sae_id = _split_release(source)
            with hub_errors(f"the SAE {source}"):
                sae = SAE.from_pretrained(release, sae_id, device=name)
        # Settings that do not go with the parameters, such as a k above m, show here.
        with torch.no_grad():
            sae.encode(torch.zeros(1, sae.cfg.d_in, device=device))
    except _BROKEN as error:
        raise UserError(
            f"the SAE {source} cannot be loaded: {error}",
            "give a sae-lens release/id, a folder with cfg.json and sae_weights.safetensors, or a "
            "Gemma Scope params.npz",
        ) from error
    return sae


def _check_folder(path: Path) -> None:
    """Hold cfg.json to the header of the weights, before either is turned into an SAE.

    Raises:
        ValueError: they are of different sizes.
    """
    config = read_json(path / "cfg.json")
    if not isinstance(config, dict):
        raise ValueError("cfg.json holds no JSON object")
    with safe_open(path / "sae_weights.safetensors", "pt") as weights:
        shape = weights.get_slice("W_enc").get_shape()
    if [config.get("d_in"), config.get("d_sae")] != shape:
        raise ValueError(
            f"cfg.json has d_in {config.get('d_in')} and d_sae {config.get('d_sae')}, the weights "
            f"have W_enc {shape}"
        )


def _check_npz(path: Path) -> None:
    """Hold the arrays' headers to the sizes of the archive's entries, before any is read.

    Raises:
        ValueError: an entry is no array of floats, is not as long as it says, or the whole expands
            beyond what numbers do.
    """
    import numpy as np

    with ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
        if size > _MOST_EXPANSION * path.stat().st_size:
            raise ValueError(f"its {path.stat().st_size:,} bytes expand to {size:,}")
        for entry in archive.infolist():
            with archive.open(entry) as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError(f"{entry.filename} is of an unknown version")
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                length = file.tell() + math.prod(shape) * dtype.itemsize
            if dtype.kind != "f" or length != entry.file_size:
                raise ValueError(f"{entry.filename} is not the {dtype} of shape {shape} it says")


def _fold(sae: Any) -> None:
    """Take the norm of the decoder's rows into the encoder, where sae-lens would do it later."""
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        sae.fold_W_dec_norm()
        sae.cfg.rescale_acts_by_decoder_norm = False


def check_encoder(encoder: SparseEncoder, source: str, site: Any, width: int) -> None:
    """Refuse an SAE that was not made for this model or site.

    Args:
        encoder: the SAE.
        source: its name in messages.
        site: where it is to be used.
        width: d of the model.
    """
    if encoder.width != width:
        raise UserError(
            f"the SAE {source} reads states of width {encoder.width}, the model's are {width} wide",
            "name an SAE that was trained on this model",
        )
    # TransformerLens writes blocks.L.hook_resid_post, transformers model.layers.L.
    hook = str(encoder.sae.cfg.metadata.hook_name or "")
    layer = re.search(r"(?:blocks|layers)\.(\d+)", hook)
    kinds = {"hook_resid_post": "resid_post", "hook_mlp_out": "mlp_out"}
    kind = kinds.get(hook.rpartition(".")[2])
    if (layer and int(layer[1]) != site.layer) or (kind and kind != site.kind):
        raise UserError(
            f"the SAE {source} was trained at {hook}, not at {site}",
            "give the --layer and --site it was trained at, or another --sae",
        )


def _split_release(source: str) -> tuple[str, str]:
    """A sae-lens release and the id in it; an unknown release is a hub repository owner/name."""
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


def _read_gemma_scope(
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
