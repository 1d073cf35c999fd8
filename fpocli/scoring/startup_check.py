"""Before a model scores anything: does it compute what plain transformers computes?"""

from dataclasses import replace

import numpy as np
import torch

from fpocli.model.attention import length_multiple
from fpocli.model.language_model import LanguageModel
from fpocli.model.packing import pack
from fpocli.scoring.score import score
from fpocli.store.records import TokenPairs
from fpocli.system.errors import UserError

# Tokens of a pair whose log-probabilities are held against the model's own forward pass.
_CHECKED = 32


def check_model(model: LanguageModel, tokens: TokenPairs, device: torch.device) -> None:
    """Refuse a model whose head does more than a product and a soft-cap, or that does not follow
    the attention rule of packed rows.

    Model families are many, and one that ignores a mask or the positions makes every number
    wrong. So the first pair is scored again with other tokens in one response, or in a neighbour
    of the row, which must not change the rest at all; and with its responses in each other's
    place, which may change them by rounding only.
    """
    pair = tokens.pair(0)
    batch = pack([pair], length_multiple(device)).to(device)
    with torch.inference_mode():
        own = model.own_logprobs(batch, _CHECKED)
        difference = (model(batch)[0][:_CHECKED] - own).abs().max().item()
    if difference > (1e-3 if model.network.dtype == torch.float32 else 0.5):
        raise UserError(
            f"{type(model.network).__name__} makes its logits in a way of its own: "
            f"log-probabilities differ by {difference:.3g} nats",
            "Gemma-2, Gemma-3 and Llama models are supported",
        )
    chosen, rejected = np.asarray(pair.chosen), np.asarray(pair.rejected)
    foreign = pair.prompt[-1]
    other = replace(pair, rejected=np.full_like(rejected, foreign))
    trials = [
        [pair, pair],
        [other, pair],
        [pair, replace(pair, chosen=np.full_like(chosen, foreign))],
        [replace(pair, chosen=rejected, rejected=chosen)],
    ]
    with torch.inference_mode():
        plain, first, last, (swapped,) = (
            score(model, {}, pack(row, length_multiple(device)).to(device)).average.cpu()
            for row in trials
        )
    changes = [
        (plain[0] - first[0])[0],
        (plain[1] - first[1]),
        (plain[0] - last[0]),
        (plain[1] - last[1])[1],
    ]
    neighbour = max(change.abs().max().item() for change in changes)
    place = (plain[0] - swapped.flip(0)).abs().max().item()
    if neighbour > 1e-4 or place > (0.01 if model.network.dtype == torch.float32 else 0.5):
        raise UserError(
            f"{type(model.network).__name__} does not follow the attention rule of packed rows: "
            f"the score of a response changes by {max(neighbour, place):.3g} nats per token with "
            "what stands beside it",
            "Gemma-2, Gemma-3 and Llama models are supported",
        )
