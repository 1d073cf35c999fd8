"""Memory and time of the sequential KL, chunk by chunk, beside the whole logits of both models.

    .venv/bin/python benchmarks/kl.py --data PAIRS.jsonl

Forward and backward of tdpo2's terms on packed rows of real pairs, the reference beside the policy,
both ways in turn in one process. The default model is the demo's (run `make demo` first), the pairs
are this repository's.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from unittest.mock import patch

import torch
from common import forget_peak, machine, measure_parser, memory, middle, write_page
from torch import Tensor

from fpocli import head, model
from fpocli.batches import Batch, default_tokens_per_row, fill_rows, pack
from fpocli.catalog import find_model
from fpocli.model import FrozenReference, load_model
from fpocli.pairs import open_source, read_pairs
from fpocli.scoring import score
from fpocli.tokens import PairTokenizer


def main() -> None:
    """Measure both and write the page."""
    parser = measure_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=16)
    arguments = parser.parse_args()
    device = torch.device("cpu")
    folder = find_model(arguments.model)
    tokenizer = PairTokenizer(folder, None, arguments.max_length, arguments.max_length - 1)
    pairs = list(tokenizer(read_pairs(open_source(arguments.data, None, arguments.pairs))))
    rows = fill_rows([len(pair) for pair in pairs], default_tokens_per_row(device))
    batches = [pack([pairs[i] for i in row]) for row in rows]
    policy, other = (load_model(folder, [], torch.bfloat16, device) for _ in range(2))
    reference = FrozenReference(other.network, [])
    policy.network.activation_checkpointing_enable()
    policy.train()
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))

    def step(batch: Batch) -> Tensor:
        scores = score(policy, {}, batch, reference(batch))
        (scores.logp.sum() + scores.kl.sum()).backward()
        policy.network.zero_grad()
        return scores.kl.detach()

    ways: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
        "chunk by chunk": head.logprobs_and_kl,
        "whole logits": whole_logits,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[float]] = {name: [] for name in ways}
    values: dict[str, list[Tensor]] = {name: [] for name in ways}
    for number, batch in enumerate([batches[0], *batches]):
        for name in ways if number % 2 else reversed(ways):
            gc.collect()
            forget_peak()
            before, began = memory("VmRSS"), time.perf_counter()
            with patch.object(model, "logprobs_and_kl", ways[name]):
                kl = step(batch)
            if number:
                seconds[name].append(time.perf_counter() - began)
                peaks[name].append((memory("VmHWM") - before) / 1e3)
                values[name].append(kl)
    report(arguments, batches, seconds, peaks, values)


def whole_logits(
    network: object, final: Tensor, targets: Tensor, reference: object, expected: Tensor
) -> tuple[Tensor, Tensor]:
    """What head.logprobs_and_kl computes, with all logits at once."""
    guess = head.logits(network, final).log_softmax(-1)
    with torch.no_grad():
        target = head.logits(reference, expected).log_softmax(-1)
    kl = (target.exp() * (target - guess)).sum(-1)
    return guess.gather(-1, targets[:, None])[:, 0], kl


def report(
    arguments: argparse.Namespace,
    batches: list[Batch],
    seconds: dict[str, list[float]],
    peaks: dict[str, list[float]],
    values: dict[str, list[Tensor]],
) -> None:
    """The page."""
    rows = "\n".join(
        f"| {name} | {middle(peaks[name])} | {sum(seconds[name]):.1f} |" for name in seconds
    )
    one, other = (torch.cat(found) for found in values.values())
    scored = statistics.mean(len(batch.targets) for batch in batches)
    write_page(
        "kl",
        f"""# The sequential KL, {datetime.now(UTC):%Y-%m-%d}

Forward and backward of log-probabilities and KL, bfloat16, reference beside the policy, {len(one)}
real pairs of at most {arguments.max_length} tokens a sequence in {len(batches)} packed rows, which
score {scored:,.0f} tokens each on average; both ways in turn, row by row.

{machine()}
Command: `python benchmarks/kl.py --data PAIRS.jsonl`.

| | GB beyond what was held, by row | seconds, all rows |
|---|---|---|
{rows}

The two KLs of a response differ by at most {((one - other).abs() / other).max():.1e} of it.
""",
    )


if __name__ == "__main__":
    main()
