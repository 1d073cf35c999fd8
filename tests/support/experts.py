"""The auxiliary loss of a mixture of experts by its definition, over plain transformers."""

from collections.abc import Sequence

import tiny
import torch


def router_logits(network, prompt, *responses) -> list[torch.Tensor]:
    """Of a prompt's and its responses' tokens, the prompt once, by layer [tokens, E]. Each response
    is run behind the prompt in a sequence by itself."""
    layers: list[list[torch.Tensor]] = []
    with tiny.plain(network):
        for response in responses:
            ids = torch.cat([torch.as_tensor(prompt), torch.as_tensor(response)])[None]
            found = network(ids, use_cache=False, output_router_logits=True).router_logits
            layers = layers or [[] for _ in found]
            for layer, logits in zip(layers, found, strict=True):
                layer.append(logits[len(prompt) if layer else 0 :])
    return [torch.cat(layer) for layer in layers]


def aux_loss(pairs: Sequence[list[torch.Tensor]], k: int = 2) -> torch.Tensor:
    """Of all tokens of pairs together: E times the sum over experts of the mean number of choices
    and the mean probability."""
    logits = torch.cat([layer for pair in pairs for layer in pair])
    probabilities = logits.softmax(-1)
    largest = torch.zeros_like(probabilities).scatter(1, probabilities.topk(k).indices, 1.0)
    return logits.shape[1] * (largest.mean(0) * probabilities.mean(0)).sum()
