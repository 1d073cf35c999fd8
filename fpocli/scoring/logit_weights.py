"""--feature-weights logits: weights of the features from the model and the store, without a file.

Shapes: V vocabulary, m features of a site.
"""

from typing import Any

import torch
from torch import Tensor

from fpocli.features.logit_effect import logit_effect
from fpocli.features.pretrained import load_decoder
from fpocli.features.weights import FeatureWeights
from fpocli.model.final_norm import final_norm
from fpocli.store.reader import Store
from fpocli.system.console import progress

_TOKENS = 2**20


def token_counts(store: Store, vocabulary: int) -> Tensor:
    """How often each token occurs among the store's first million: int64 [V].

    Args:
        store: the store.
        vocabulary: V.
    """
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    left = _TOKENS
    for block in range(store.blocks):
        ids = torch.from_numpy(store.tokens(block).ids[:left].astype("int64"))
        counts += torch.bincount(ids, minlength=vocabulary)
        left -= len(ids)
        if not left:
            break
    return counts


def logit_weights(
    sources: dict[str, str], network: Any, tokens: Tensor
) -> dict[str, FeatureWeights]:
    """Weights by the effect on the logits (`features/logit_effect.py`) for all features of sites.

    Args:
        sources: the SAE of each site.
        network: transformers' model with its head.
        tokens: [V], how often each token occurs.

    Raises:
        UserError: an SAE cannot be loaded, or the network has no final norm that is known.
    """
    head, norm = network.get_output_embeddings().weight, final_norm(network)
    weights = {}
    with progress("Effects of the features on the logits", len(sources)) as bar:
        for site, source in sources.items():
            decoder = load_decoder(source, head.device)
            omega = logit_effect(head.detach(), norm.gain, decoder, tokens, centred=norm.centred)
            weights[site] = FeatureWeights(
                omega,
                torch.zeros(len(omega), dtype=torch.int8),
                torch.zeros(0, dtype=torch.int64),
                {},
            ).to(head.device)
            bar.advance()
    return weights
