"""What a model's SAE features do token by token: pairs are run through the model again.

Positions are those of scoring: the activation that belongs to response token t is that of the
state which predicts it, so it is shown at the token before (docs/method.md, "Which positions
count").

Shapes: P pairs, R responses, n scored tokens of a response, m features, q chosen features, d model
width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fpocli.data.pairs import TokenPair
from fpocli.features.encoder import SparseEncoder
from fpocli.features.site import Site
from fpocli.model.attention import length_multiple
from fpocli.model.language_model import LanguageModel, load_model
from fpocli.model.packing import default_packed_length, pack, plan_packing
from fpocli.scoring.saes import load_encoders
from fpocli.scoring.startup_check import check_against_transformers
from fpocli.store.reader import Store
from fpocli.system.console import progress
from fpocli.system.model_folder import ModelFolder


@dataclass(frozen=True)
class Peaks:
    """What every feature does in each of the 2P responses; rows 2i and 2i + 1 are pair i's.

    Args:
        pooled: float32 [2P, m], mean over the scored positions.
        peak: float32 [2P, m], the largest activation at a single position.
    """

    pooled: np.ndarray
    peak: np.ndarray


def load_model_and_sae(
    store: Store, folder: ModelFolder, site: Site, sae: str | None, device: torch.device
) -> tuple[LanguageModel, SparseEncoder]:
    """A model, as a store's pairs are scored, and the SAE of a site.

    Args:
        store: the store.
        folder: of the reference, or of a policy.
        site: of the store.
        sae: where the SAE is now; None is where it was.
        device: where both run.

    Raises:
        UserError: one of them cannot be loaded, or is not what the store was made with.
    """
    dtype = getattr(torch, store.meta["model"]["dtype"])
    model = load_model(folder, [site], dtype, device).eval()
    check_against_transformers(model, store.tokens(0))
    named = [sae] if sae else []
    (encoder,) = load_encoders(store, [site], named, model.config.hidden_size, device).values()
    return model, encoder


def peaks(
    model: LanguageModel,
    encoder: SparseEncoder,
    pairs: Sequence[TokenPair],
    packed_length: int | None = None,
) -> Peaks:
    """Run a model over pairs and summarise every feature.

    Args:
        model: a model whose only site is the encoder's.
        encoder: the SAE.
        pairs: P pairs.
        packed_length: the most tokens of a packed sequence; None is the device's default.
    """
    shape = (2 * len(pairs), encoder.features)
    found = Peaks(np.empty(shape, np.float32), np.empty(shape, np.float32))
    for response, states in _states(model, pairs, packed_length):
        total = torch.zeros(encoder.features, device=states.device)
        highest = torch.zeros_like(total)
        for chunk in encoder.chunks(states):
            values = encoder.sae.encode(chunk).float()
            total += values.sum(0)
            highest = torch.maximum(highest, values.max(0).values)
        found.pooled[response] = (total / len(states)).cpu().numpy()
        found.peak[response] = highest.cpu().numpy()
    return found


def token_activations(
    model: LanguageModel,
    encoder: SparseEncoder,
    pairs: Sequence[TokenPair],
    features: Sequence[int],
    packed_length: int | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The activations of chosen features at every scored position.

    Args:
        model: a model whose only site is the encoder's.
        encoder: the SAE.
        pairs: P pairs.
        features: q features.
        packed_length: the most tokens of a packed sequence; None is the device's default.

    Returns:
        for each pair the chosen and the rejected response's, float32 [n, q].
    """
    chosen = torch.tensor(list(features), dtype=torch.int64, device=model.network.device)
    found: list[np.ndarray] = [np.empty(0)] * (2 * len(pairs))
    for response, states in _states(model, pairs, packed_length):
        values = [encoder.sae.encode(chunk)[:, chosen] for chunk in encoder.chunks(states)]
        found[response] = torch.cat(values).float().cpu().numpy()
    return list(zip(found[::2], found[1::2], strict=True))


@torch.inference_mode()
def _states(
    model: LanguageModel, pairs: Sequence[TokenPair], packed_length: int | None
) -> Iterator[tuple[int, Tensor]]:
    """The number of each response and its hidden states at the scored positions, [n, d]."""
    device = model.network.device
    budget = packed_length or default_packed_length(device)
    packed = plan_packing([len(pair) for pair in pairs], budget)
    with progress("Reading activations", len(pairs)) as bar:
        for members in packed:
            batch = pack([pairs[i] for i in members], length_multiple(device)).to(device)
            _, states = model.states(batch)
            (at_site,) = states.values()
            responses = (2 * i + side for i in members for side in (0, 1))
            yield from zip(responses, at_site.split(batch.counts), strict=True)
            bar.advance(len(members))
