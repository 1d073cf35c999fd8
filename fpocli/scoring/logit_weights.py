"""--feature-weights logits: weights of the features from the model and the store, without a file.

Shapes: V vocabulary, m features of a site.
"""

from typing import Any

import torch

from fpocli.features.logit_effect import logit_effect
from fpocli.features.pretrained import load_decoder
from fpocli.features.weights import FeatureWeights
from fpocli.model.final_norm import final_norm_gain
from fpocli.store.reader import Store
from fpocli.system.console import progress


def logit_weights(store: Store, sources: dict[str, str], network: Any) -> dict[str, FeatureWeights]:
    """Weights by the effect on the logits (`features/logit_effect.py`) for all features of sites.

    How often a token occurs is counted in the store's first block, each token once more, so that
    none has no weight.

    Args:
        store: the store.
        sources: the SAE of each site.
        network: transformers' model with its head.

    Raises:
        UserError: an SAE cannot be loaded, or the network has no final norm that is known.
    """
    head = network.get_output_embeddings().weight
    counts = torch.bincount(
        torch.from_numpy(store.tokens(0).ids.astype("int64")), minlength=len(head)
    )
    weights = {}
    with progress("Effects of the features on the logits", len(sources)) as bar:
        for site, source in sources.items():
            decoder = load_decoder(source, head.device)
            omega = logit_effect(head.detach(), final_norm_gain(network), decoder, counts + 1)
            weights[site] = FeatureWeights(
                omega,
                torch.zeros(len(omega), dtype=torch.int8),
                torch.zeros(0, dtype=torch.int64),
                {},
            ).to(head.device)
            bar.advance()
    return weights
