"""Where the time of scoring and of training goes, by kind of operation, on a CPU.

    .venv/bin/python benchmarks/breakdown.py --model FOLDER --data PAIRS.jsonl

Defaults are the demo's model (run `make demo` first) and this repository's pairs.
"""

import argparse
import time
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import torch
from common import machine, measure_parser, middle, real_rows, write_page
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from fpocli.model.attention import BY_SEQUENCE, attend_by_sequence, attention_mask
from fpocli.model.language_model import load_model
from fpocli.model.packing import default_packed_length
from fpocli.system.model_folder import find_model

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "attention: products": ("aten::bmm", "aten::baddbmm"),
    "attention: softmax": ("aten::_softmax", "aten::_softmax_backward_data"),
    "log-softmax of the vocabulary": (
        "aten::_log_softmax",
        "aten::_log_softmax_backward_data",
        "aten::nll_loss_forward",
        "aten::nll_loss_backward",
    ),
    "copies between dtypes and layouts": ("aten::copy_", "aten::cat", "aten::clone"),
}


def main() -> None:
    """Profile both and write the page."""
    parser = measure_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=12)
    arguments = parser.parse_args()
    device = torch.device("cpu")
    tokens, batches = real_rows(arguments)
    model = load_model(find_model(arguments.model), [], torch.bfloat16, device)

    def score() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(batch)

    def train() -> None:
        for batch in batches:
            model(batch)[0].sum().backward()
        model.zero_grad()

    found = {"scoring": measure(score)}
    model.network.activation_checkpointing_enable()
    model.train()
    found["forward and backward"] = measure(train)
    weights = [p.numel() for p in model.network.parameters()]
    head = model.network.get_output_embeddings().weight.numel()
    scored = sum(len(batch.targets) for batch in batches)
    # Operations of the weights' matrix products in one forward pass.
    operations = 2 * ((sum(weights) - head) * tokens + head * scored)
    ratio = attention_ratio(model.config, batches)
    report(arguments, found, tokens, operations, ratio)


def attention_ratio(config: Any, batches: list[Any]) -> str:
    """Time of attention by sequence over that of torch's fused kernel on the same sequences,
    forward and backward, alternating batch by batch."""
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads

    def fused(query: Any, key: Any, value: Any, spans: Any) -> Any:
        outputs = []
        for start, chosen, rejected, end in spans.tolist():
            for first, last in ((chosen, rejected), (rejected, end)):
                parts = [
                    torch.cat([part[:, :, start:chosen], part[:, :, first:last]], 2)
                    for part in (query, key, value)
                ]
                outputs.append(
                    F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
                )
        return torch.cat(outputs, 2)

    ratios = []
    for batch in [batches[0], *batches]:
        band = attention_mask(batch, None, BY_SEQUENCE, torch.bfloat16)
        shapes = [(1, len(batch.ids), count, width) for count in (heads, keys, keys)]
        inputs = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
        views = [part.transpose(1, 2) for part in inputs]
        seconds = []
        for own in (True, False):
            began = time.perf_counter()
            if own:
                output, _ = attend_by_sequence(
                    torch.nn.Module(), *views, band, scaling=width**-0.5, spans=batch.spans
                )
            else:
                output = fused(*views, batch.spans)
            output.sum().backward()
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[0] / seconds[1])
    return middle(ratios[1:])


def measure(work: Any) -> Counter[str]:
    """Seconds by kind of operation, after a round that warms up."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    kind_of = {name: kind for kind, names in KINDS.items() for name in names}
    seconds: Counter[str] = Counter()
    for event in seen.key_averages():
        seconds[kind_of.get(event.key, "all else")] += event.self_cpu_time_total / 1e6
    return seconds


def report(
    arguments: argparse.Namespace,
    found: dict[str, Counter[str]],
    tokens: int,
    operations: float,
    ratio: str,
) -> None:
    """The page."""
    totals = {name: sum(seconds.values()) for name, seconds in found.items()}
    table = "\n".join(
        f"| {kind} | " + " | ".join(f"{found[n][kind] / totals[n]:.0%}" for n in found) + " |"
        for kind in (*KINDS, "all else")
    )
    product = operations / found["scoring"]["matrix products"] / 1e9
    write_page(
        "breakdown",
        f"""# Where the time goes, {datetime.now(UTC):%Y-%m-%d}

{arguments.pairs} real pairs of at most {arguments.max_length} tokens a sequence, {tokens:,} tokens,
bfloat16, sequences of {default_packed_length(torch.device("cpu")):,} tokens; activation
checkpointing on in training. Shares of the processor's time, without the optimiser.

{machine()}
Command: `python benchmarks/breakdown.py --data PAIRS.jsonl`.

| | {" | ".join(found)} |
|---|---|---|
{table}
| seconds | {" | ".join(f"{total:.1f}" for total in totals.values())} |

The matrix products of scoring run at {product:.0f} billion operations a second. They cannot be
avoided, and at that speed they alone limit scoring to
{tokens / found["scoring"]["matrix products"]:,.0f} tokens a second.

Attention by sequence takes {ratio} of the time of torch's fused kernel on the same sequences,
forward and backward.
""",
    )


if __name__ == "__main__":
    main()
