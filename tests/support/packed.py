"""Random pairs of token ids, and their scores by plain transformers."""

import numpy as np
import tiny
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fpocli.data.pairs import TokenPair


def random_pairs(count: int, seed: int = 0, most: int = 12) -> list[TokenPair]:
    rng = np.random.default_rng(seed)
    return [
        TokenPair(*(rng.integers(3, tiny.VOCABULARY, rng.integers(1, most)) for _ in range(3)))
        for _ in range(count)
    ]


class Largest(TorchDispatchMode):
    """Records the largest tensor with a vocabulary axis that any operation makes."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.ndim and made.shape[-1] == tiny.VOCABULARY:
            self.rows = max(self.rows, made.numel() // tiny.VOCABULARY)
        return made


runs = st.lists(st.integers(1, 200), min_size=1, max_size=7).map(np.array)


pairs = st.lists(st.builds(TokenPair, runs, runs, runs), min_size=1, max_size=4)


def naive_kl(policy, reference, prompt, response):
    """K of one response by its definition, in float64, over plain transformers' logits."""
    ids = torch.tensor(np.concatenate([prompt, response]))[None]
    predictors = slice(len(prompt) - 1, ids.shape[1] - 1)
    with tiny.plain(policy), tiny.plain(reference):
        guess = policy(ids, use_cache=False).logits[0, predictors].double().softmax(-1)
        with torch.no_grad():
            target = reference(ids, use_cache=False).logits[0, predictors].double().softmax(-1)
    return (target * (target.log() - guess.log())).sum()
