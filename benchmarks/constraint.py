"""What the feature constraint costs: forward and backward of fpo and of simpo.

    .venv/bin/python benchmarks/constraint.py --data PAIRS.jsonl

Both methods alternate on the same packed sequences in one process, so their ratio holds when the
machine's speed drifts. A step's memory is the most the process held during it, which Linux
measures after its earlier peak is reset. A random SAE of 16,384 features stands in for a real
one. The default model is the demo's (run `make demo` first), the pairs are this repository's.
"""

import argparse
import statistics
import tempfile
from datetime import UTC, datetime

import torch
from common import (
    by_turns,
    load_encoders,
    machine,
    make_store,
    measure_parser,
    middle,
    model_width,
    write_page,
)

from fpocli.config import TrainConfig
from fpocli.features.site import Site
from fpocli.model.language_model import load_model
from fpocli.model.packing import default_packed_length
from fpocli.scoring.score import score
from fpocli.system.model_folder import find_model
from fpocli.training.micro_batch import MicroBatch
from fpocli.training.objective import objective
from fpocli.training.pair_loader import PairLoader

FEATURES, PAIRS = 16_384, 24


def main() -> None:
    """Time both methods and write the page."""
    parser = measure_parser(__doc__)
    parser.add_argument("--layer", type=int, default=24)
    parser.set_defaults(sae=None, features=FEATURES)
    arguments = parser.parse_args()
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(arguments, folder, PAIRS)
        loader = PairLoader(
            store, batch_size=PAIRS, packed_length=default_packed_length(device),
            eval_fraction=0, seed=0, rank=0, world=1,
        )  # fmt: skip
        rows = next(iter(loader.steps(0, 1, device)))
        encoders = load_encoders(store, device)
    sites = [Site.parse(site) for site in store.sites]
    model = load_model(find_model(arguments.model), sites, torch.bfloat16, device).train()
    model.network.activation_checkpointing_enable()
    methods = {"simpo": {}, "fpo": encoders}

    def work(name: str, row: MicroBatch) -> None:
        scores = score(model, methods[name], row.batch)
        settings = TrainConfig(cache="unused", method=name)
        loss, _ = objective(scores, row.reference, methods[name], settings)
        loss.mean().backward()

    seconds, peaks = by_turns(methods, rows, work)
    report(arguments, seconds, peaks)


def report(
    arguments: argparse.Namespace, seconds: dict[str, list[float]], peaks: dict[str, list[float]]
) -> None:
    """The page."""

    def ratio(values: dict[str, list[float]]) -> str:
        pairs = zip(values["fpo"], values["simpo"], strict=True)
        return middle((fpo / simpo for fpo, simpo in pairs), ".3f")

    rows = "\n".join(
        f"| {name} | {sum(seconds[name]):.1f} | {statistics.median(peaks[name]):.3f} |"
        for name in seconds
    )
    write_page(
        "constraint",
        f"""# The cost of the constraint, {datetime.now(UTC):%Y-%m-%d}

Forward and backward of {PAIRS} real pairs of at most {arguments.max_length} tokens a sequence, in
{len(seconds["fpo"])} packed sequences of the default length, bfloat16, activation
checkpointing on, without the optimiser. m = {FEATURES:,}, K = 256, k = 50. The
methods alternate sequence by sequence.

{machine()}
Command: `python benchmarks/constraint.py --data PAIRS.jsonl`.

| method | seconds in all | peak GB, median |
|---|---|---|
{rows}

fpo / simpo, sequence by sequence: time {ratio(seconds)}, in all
{sum(seconds["fpo"]) / sum(seconds["simpo"]):.3f}; peak memory {ratio(peaks)}. The weights of the
SAE are in memory for both, {FEATURES * model_width(arguments.model) * 4 / 1e6:.0f} MB of them.
""",
    )


if __name__ == "__main__":
    main()
