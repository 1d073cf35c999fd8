"""On a GPU, at Gemma-2-2B's shape: is the result right, and how fast is it?

    python benchmarks/gpu.py              # needs about 60 GB of GPU memory and no downloads
    python benchmarks/gpu.py --tiny       # the same code at a tiny size in float32, on a CPU too

Random weights, bfloat16, pairs of UltraFeedback's lengths up to 2,048 tokens. First flex_attention
and the fused head are compared with attention sequence by sequence and the chunked head, in
scores and gradients, in float32 on a small model. Then packed sequences are scored and trained on,
and the model's operations per second are compared with the device's peak for bfloat16 (--peak, in
TFLOP/s).
"""

import argparse
import time
from datetime import UTC, datetime
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from common import machine, write_page

from fpocli.config import TrainConfig
from fpocli.data.pairs import TokenPair
from fpocli.model import head
from fpocli.model import language_model as model
from fpocli.model.attention import BY_SEQUENCE, length_multiple
from fpocli.model.language_model import LanguageModel
from fpocli.model.network import choose_device
from fpocli.model.packing import pack, plan_packing
from fpocli.scoring.score import score
from fpocli.store.records import ReferenceValues
from fpocli.training.objective import objective

SMALL = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 64,
}  # fmt: skip


def main() -> None:
    """Check, measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--packed-length", type=int, default=8192)
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of an H100 in bfloat16")
    arguments = parser.parse_args()
    device = choose_device(None)
    errors = check(device)
    speeds = measure(arguments, device)
    report(arguments, errors, speeds)


def build(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> Any:
    """A Gemma-2 of random weights; without a shape, Gemma-2-2B's own."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    with device:
        return Gemma2ForCausalLM(Gemma2Config(**shape)).to(dtype)


def make_pairs(count: int, vocabulary: int, longest: int) -> list[TokenPair]:
    """Random ids; log-normal lengths like UltraFeedback's, cut at `longest`."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(count):
        prompt = min(int(rng.lognormal(4.7, 0.9)) + 8, longest // 2)
        responses = [min(int(rng.lognormal(5.5, 0.8)) + 2, longest - prompt) for _ in range(2)]
        pairs.append(TokenPair(*(rng.integers(0, vocabulary, n) for n in (prompt, *responses))))
    return pairs


def check(device: torch.device) -> dict[str, float]:
    """The largest difference of scores, and of a gradient relative to its largest entry."""
    pairs = make_pairs(12, SMALL["vocab_size"], 512)

    def run(multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
        network = build(SMALL, torch.float32, device)
        scores = score(LanguageModel(network, []), {}, pack(pairs, multiple).to(device)).average
        weight = network.model.layers[0].self_attn.k_proj.weight
        (gradient,) = torch.autograd.grad((scores[:, 0] - scores[:, 1]).sum(), weight)
        return scores.detach(), gradient

    scores, gradient = run(length_multiple(device))
    with (
        patch.object(model, "choose_kernel", lambda _: BY_SEQUENCE),
        patch.object(head, "choose_head", lambda _: head.CHUNKED),
    ):
        plain, expected = run(1)
    return {
        "scores": (scores - plain).abs().max().item(),
        "gradient": ((gradient - expected).abs().max() / expected.abs().max()).item(),
    }


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Tokens per second of scoring and of training, and their share of the peak."""
    shape, dtype, longest = {}, torch.bfloat16, 2048
    if arguments.tiny:
        # Many CPUs are slow in bfloat16.
        shape, dtype, longest = SMALL, torch.float32, 128
    network = build(shape, dtype, device)
    network.activation_checkpointing_enable()
    policy = LanguageModel(network, [])
    pairs = make_pairs(arguments.pairs, policy.config.vocab_size, longest)
    rows = plan_packing([len(pair) for pair in pairs], arguments.packed_length)
    multiple = length_multiple(device)
    batches = [pack([pairs[i] for i in row], multiple).to(device) for row in rows]
    tokens = sum(len(pair) for pair in pairs)
    weights = sum(p.numel() for p in network.parameters())
    config = TrainConfig(cache="unused", method="simpo")

    def forward() -> None:
        with torch.inference_mode():
            for batch in batches:
                policy(batch)[0].sum().item()

    def step() -> None:
        for batch in batches:
            scores = score(policy.train(), {}, batch)
            nothing = torch.zeros_like(scores.logp)
            reference = ReferenceValues(nothing, nothing[:, 0], {})
            objective(scores, reference, {}, config)[0].mean().backward()
        network.zero_grad()

    result = {"tokens": float(tokens), "rows": float(len(rows))}
    # Operations a weight and token: 2 forward, 4 backward. Recomputation is not counted as work.
    for name, work, operations in (("forward", forward, 2), ("forward and backward", step, 6)):
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        speed = tokens / (time.perf_counter() - began)
        result[name] = speed
        result[f"{name} share"] = speed * operations * weights / (arguments.peak * 1e12)
    if device.type == "cuda":
        result["peak memory"] = torch.cuda.max_memory_allocated() / 1e9
    return result


def report(
    arguments: argparse.Namespace, errors: dict[str, float], speeds: dict[str, float]
) -> None:
    """The page; figures of --tiny are only printed."""
    shape = "a toy's shape" if arguments.tiny else "Gemma-2-2B's shape"
    text = f"""# On a GPU, {datetime.now(UTC):%Y-%m-%d}

{shape}, random weights, {arguments.pairs} pairs, {speeds["tokens"]:,.0f} tokens in
{speeds["rows"]:.0f} packed sequences of {arguments.packed_length:,}.

{machine()}
Command: `python benchmarks/gpu.py --peak {arguments.peak:g}`.

The device's kernels against attention by sequence and the chunked head, on a small Gemma-2 in
float32: scores differ by at most {errors["scores"]:.1e} nats per token, a gradient by
{errors["gradient"]:.1e} of its largest entry.

| | tokens/s | share of the peak |
|---|---|---|
| forward | {speeds["forward"]:,.0f} | {speeds["forward share"]:.1%} |
| forward and backward | {speeds["forward and backward"]:,.0f} | {
        speeds["forward and backward share"]:.1%} |

Peak memory: {speeds.get("peak memory", float("nan")):.1f} GB, without an optimiser.
"""
    print(text) if arguments.tiny else write_page("gpu", text)


if __name__ == "__main__":
    main()
