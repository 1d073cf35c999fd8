"""The activations of chosen features at every token of responses.

Shapes: n tokens of a response, F features.
"""

from collections.abc import Sequence

import numpy as np
import torch

from fpocli.data.pairs import TokenPair
from fpocli.features.encoder import SparseEncoder
from fpocli.features.site import Site
from fpocli.model.language_model import LanguageModel
from fpocli.model.packing import pack
from fpocli.system.console import progress


@torch.no_grad()
def token_activations(
    model: LanguageModel,
    encoder: SparseEncoder,
    site: Site,
    pairs: Sequence[TokenPair],
    features: Sequence[int],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Run the model on pairs, and read features where each token is predicted.

    Args:
        model: with the site among its own.
        encoder: the SAE at the site.
        site: where it reads.
        pairs: token ids.
        features: their indices.

    Returns:
        of every pair the activations of its chosen and rejected response, float32 [n, F] each.
    """
    device = next(model.parameters()).device
    found = []
    with progress("Running the model", len(pairs)) as bar:
        for pair in pairs:
            _, states = model.states(pack([pair]).to(device))
            values = encoder.sae.encode(states[str(site)])[:, list(features)].float().cpu().numpy()
            chosen, rejected = np.split(values, [len(pair.chosen)])
            found.append((chosen, rejected))
            bar.advance()
    return found
