"""The SAE encoder: pooled features, the K largest, and the gradient through chosen ones.

Shapes: n positions of one response, d model width, m features, J chosen columns.
Encoding is sae-lens's; only the differentiable columns are our own (docs/method.md).
"""

import hashlib
from typing import Any

import torch
from torch import Tensor

from fpocli.system.errors import UserError

# Positions whose features are in memory at once; on a CPU they should fit into its cache.
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
        fold_decoder_norm(sae)
        # Features need the encoder alone; half of the SAE's memory is the decoder.
        del sae.W_dec
        self.sae = sae.requires_grad_(False).eval()
        self.width: int = sae.cfg.d_in
        self.features: int = sae.cfg.d_sae

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the features apart from architecture and parameters."""
        names = ("apply_b_dec_to_input", "normalize_activations", "reshape_activations", "k")
        return {name: getattr(self.sae.cfg, name) for name in names if hasattr(self.sae.cfg, name)}

    @property
    def neuronpedia(self) -> str | None:
        """The SAE's id at Neuronpedia, such as gemma-2-2b/25-gemmascope-res-16k, if it is known."""
        known = self.sae.cfg.metadata.neuronpedia_id
        return known if isinstance(known, str) else None

    def hash(self) -> str:
        """sha256 over the encoder's parameters, in the order of their names."""
        digest = hashlib.sha256(self.architecture.encode())
        for name, tensor in sorted(self.sae.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def chunks(states: Tensor) -> tuple[Tensor, ...]:
        """States [n, d] in parts that are small enough to encode at once."""
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

    def pool_selected(self, states: Tensor, index: Tensor) -> Tensor:
        """The pooled features `index` alone, with their gradient.

        Args:
            states: [n, d].
            index: [J] features, without repetition.

        Returns:
            float32 [J].
        """
        return self.selected(states, index).sum(0) / len(states)

    def selected(self, states: Tensor, index: Tensor) -> Tensor:
        """The features `index` alone at every position, with their gradient.

        Every supported architecture is piecewise linear: an active feature is its affine
        pre-activation. So only J columns of W_enc are multiplied.

        Args:
            states: [n, d].
            index: [J] features, without repetition.

        Returns:
            float32 [n, J].
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
        return torch.where(active, value, 0)

    @torch.no_grad()
    def _active(self, states: Tensor, index: Tensor) -> Tensor:
        """Which of `index` are active where that depends on all features: bool [n, J]."""
        return torch.cat([self.sae.encode(chunk)[:, index] > 0 for chunk in self.chunks(states)])


def top_k(pooled: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest features by falling value, ties by rising index.

    Args:
        pooled: float32 [..., m], no value below 0.
        k: at most m.

    Returns:
        index int64 and value float32, both [..., k].
    """
    m = pooled.shape[-1]
    # Non-negative floats sort like their bits. Bits and reversed index together are one integer,
    # different for every feature, so the order is the same on every device.
    bits = (pooled + 0.0).view(torch.int32).long()
    reversed_index = torch.arange(m - 1, -1, -1, device=pooled.device)
    key = (bits << 32 | reversed_index).topk(k, dim=-1).values
    index = m - 1 - (key & 0xFFFFFFFF)
    return index, pooled.gather(-1, index)


def fold_decoder_norm(sae: Any) -> None:
    """Take the norm of the decoder's rows into the encoder, where sae-lens would do it later."""
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        sae.fold_W_dec_norm()
        sae.cfg.rescale_acts_by_decoder_norm = False
