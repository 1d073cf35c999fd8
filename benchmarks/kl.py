"""Memory and time of the sequential KL, chunk by chunk, and with the whole logits of both models.

    .venv/bin/python benchmarks/kl.py --data PAIRS.jsonl

Forward and backward of tdpo2's terms on packed sequences of real pairs, with the reference in
memory, both ways alternating in one process. The default model is the demo's (run `make demo`
first), the pairs are this repository's.
"""

import argparse
import statistics
from datetime import UTC, datetime
from unittest.mock import patch

import torch
from common import by_turns, machine, measure_parser, middle, real_rows, write_page
from torch import Tensor

from fpocli.model import head
from fpocli.model import language_model as model
from fpocli.model.language_model import FrozenReference, load_model
from fpocli.model.packing import PackedSequence
from fpocli.scoring.score import score
from fpocli.system.model_folder import find_model


def main() -> None:
    """Measure both and write the page."""
    parser = measure_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=16)
    arguments = parser.parse_args()
    _, batches = real_rows(arguments)
    folder = find_model(arguments.model)
    policy, other = (load_model(folder, [], torch.bfloat16, torch.device("cpu")) for _ in range(2))
    reference = FrozenReference(other.network, [])
    policy.network.activation_checkpointing_enable()
    policy.train()
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))
    ways = {"chunk by chunk": head.logprobs_and_kl, "whole logits": whole_logits}
    values: dict[str, list[Tensor]] = {name: [] for name in ways}

    def work(name: str, batch: PackedSequence) -> None:
        with patch.object(model, "logprobs_and_kl", ways[name]):
            scores = score(policy, {}, batch, reference(batch))
        (scores.logp.sum() + scores.kl.sum()).backward()
        policy.network.zero_grad()
        values[name].append(scores.kl.detach())

    seconds, peaks = by_turns(ways, batches, work)
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
    batches: list[PackedSequence],
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
    pairs = sum(len(batch.spans) for batch in batches)
    write_page(
        "kl",
        f"""# The sequential KL, {datetime.now(UTC):%Y-%m-%d}

Forward and backward of log-probabilities and KL, bfloat16, reference in memory, {pairs}
real pairs of at most {arguments.max_length} tokens a sequence in {len(batches)} packed sequences,
which score {scored:,.0f} tokens each on average; both ways alternate sequence by sequence.

{machine()}
Command: `python benchmarks/kl.py --data PAIRS.jsonl`.

| | peak GB of the process, by sequence | seconds in all |
|---|---|---|
{rows}

The relative difference of the two KLs of a response is at most
{((one - other).abs() / other).max():.1e}.
""",
    )


if __name__ == "__main__":
    main()
