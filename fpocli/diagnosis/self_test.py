"""The self-test: a tiny random Gemma-2 on every device, by fpo's kernels and by transformers.

On a new machine a driver, a compiler or a version of torch may make the kernels wrong. They do not
depend on the weights, so a model made in memory shows it within seconds, before anything is
downloaded. It has what kernels get wrong most easily: soft-capping of attention and of the logits,
a sliding window, several query heads per key head, and heads as wide as Gemma-2's.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from fpocli.data.pairs import TokenPair
from fpocli.diagnosis.check import Check
from fpocli.features.site import Site
from fpocli.model.attention import choose_kernel
from fpocli.model.head import usable_heads
from fpocli.model.language_model import LanguageModel
from fpocli.scoring.startup_check import check_gradients, check_scores
from fpocli.store.records import TokenPairs

_VOCABULARY, _LAYERS = 512, 2
# Tokens of prompt, chosen and rejected: longer than the window, and several of flex_attention's
# blocks of 128 together.
_WINDOW, _LENGTHS = 24, ((40, 60, 50), (30, 45, 70))
_DTYPES = (torch.float32, torch.bfloat16)


def self_test() -> Iterator[Check]:
    """Compare scores and gradients with plain transformers: on every device, in float32 and
    bfloat16, with the attention kernel of the device and each head that it can use."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    pairs = _pairs()
    for device in (torch.device("cpu"), *(torch.device("cuda", number) for number in gpus)):
        for dtype in _DTYPES:
            network = _network(dtype).to(device)
            for head in usable_heads(network):
                name = f"{device}, {str(dtype).removeprefix('torch.')}, attention "
                name += f"{choose_kernel(device)}, head {head}"
                yield _test(name, network, head, pairs)


def _test(name: str, network: Any, head: str, pairs: TokenPairs) -> Check:
    began = time.perf_counter()
    try:
        with _current(network.device):
            model = LanguageModel(network, [Site(_LAYERS - 1, "resid_post")], head)
            scores = check_scores(model, pairs)
            gradient = check_gradients(model, pairs)
    except Exception as error:  # whatever a kernel or its compiler raises is the result
        advice = "do not use this device and dtype before it passes; report it with the text below"
        return Check(name, "failed", str(error) or type(error).__name__, advice)
    return Check(
        name,
        "ok",
        f"within {scores.nats:.1g} nats per token of transformers, gradients within "
        f"{gradient:.1g} of their norm; {time.perf_counter() - began:.0f} s",
    )


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton starts kernels on the current GPU."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _network(dtype: torch.dtype) -> Any:
    """A random Gemma-2 on the CPU. Its weights are drawn wider than usual and its soft-caps are
    low, so that a missing cap changes much more than rounding does."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=_WINDOW,
        attn_logit_softcapping=0.5,
        final_logit_softcapping=3.0,
        max_position_embeddings=256,
    )
    network: Any = Gemma2ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return network.to(dtype).eval()


def _pairs() -> TokenPairs:
    draw = np.random.default_rng(0).integers
    parts = [[draw(3, _VOCABULARY, length) for length in lengths] for lengths in _LENGTHS]
    return TokenPairs.of([TokenPair(prompt, one, other) for prompt, one, other in parts])
