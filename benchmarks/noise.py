"""What bfloat16 does to u and D at step 0, where both should be 0, in fpo and TRL.

    .venv/bin/python benchmarks/noise.py --model FOLDER --sae FOLDER --layer N --data PAIRS.jsonl

The policy is the reference, in bfloat16. References are computed once in the data's order; then the
same pairs are scored again, shuffled, in other packed sequences (fpo) or padded batches (TRL).
Defaults are the demo's model and SAE (run `make demo` first) and this repository's pairs. On a CPU
with AMX, ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 switches AMX off.
"""

import argparse
import os
import tempfile
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from common import BATCH, load_encoders, machine, make_store, measure_parser, write_page

from fpocli.model.network import choose_device
from fpocli.model.packing import default_packed_length

SEEDS = 2


def main() -> None:
    """Measure both sides and write the page."""
    parser = measure_parser(__doc__)
    parser.add_argument("--sae", default="demo/sae")
    parser.add_argument("--layer", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--page", default="noise", help="name of the result's page")
    parser.set_defaults(features=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(arguments, folder, arguments.pairs)
        budget = default_packed_length(choose_device(None))
        own = [ours(arguments, store, tokens) for tokens in (budget, 512)]
        other = theirs(arguments, store, folder)
    report(arguments, store, own, other)


@torch.inference_mode()
def ours(arguments: argparse.Namespace, store: Any, packed_length: int) -> dict[str, np.ndarray]:
    """Per pair and seed: the normalised margin's error in nats per token, and D of both."""
    from fpocli.config import TrainConfig
    from fpocli.features.site import Site
    from fpocli.model.language_model import load_model
    from fpocli.scoring.score import score
    from fpocli.system.model_folder import find_model
    from fpocli.training.objective import objective
    from fpocli.training.pair_loader import PairLoader

    device = choose_device(None)
    config = TrainConfig(cache="unused", alpha=0.0, beta=1.0)
    sites = [Site.parse(name) for name in store.sites]
    model = load_model(find_model(arguments.model), sites, torch.bfloat16, device).eval()
    encoders = load_encoders(store, device)
    margins, distances = [], []
    for seed in range(SEEDS):
        loader = PairLoader(
            store, batch_size=store.pairs, packed_length=packed_length, eval_fraction=0,
            seed=seed, rank=0, world=1,
        )  # fmt: skip
        for row in next(iter(loader.steps(0, 1, device))):
            scores = score(model, encoders, row.batch)
            _, metrics = objective(scores, row.reference, encoders, config)
            margins.append(metrics["u"].abs())
            distances += [metrics["distance_chosen"], metrics["distance_rejected"]]
    return {"margin": torch.cat(margins).numpy(), "distance": torch.cat(distances).numpy()}


def theirs(arguments: argparse.Namespace, store: Any, folder: str) -> dict[str, np.ndarray]:
    """Per pair and seed: the same error of TRL's log-probabilities."""
    import peers

    rows = peers.rows_of(store, list(range(store.pairs)))
    trainer = peers.dpo(arguments.model, rows, f"{folder}/trl", torch.bfloat16)
    reference = np.array([[r["ref_chosen_logps"], r["ref_rejected_logps"]] for r in
                          trainer.train_dataset])  # fmt: skip
    counts = np.array([[len(r["chosen_ids"]), len(r["rejected_ids"])] for r in rows])
    errors = []
    for seed in range(SEEDS):
        order = np.random.default_rng(seed).permutation(store.pairs)
        for start in range(0, store.pairs, BATCH):
            mine = order[start : start + BATCH]
            again = torch.stack(peers.reference_logps(trainer, [rows[int(i)] for i in mine]), 1)
            averages = (again.float().cpu().numpy() - reference[mine]) / counts[mine]
            errors.append(np.abs(averages[:, 0] - averages[:, 1]))
    return {"margin": np.concatenate(errors)}


def report(
    arguments: argparse.Namespace,
    store: Any,
    own: list[dict[str, np.ndarray]],
    other: dict[str, np.ndarray],
) -> None:
    """The page."""

    def row(name: str, values: dict[str, np.ndarray]) -> str:
        margin = values["margin"]
        cells = [name, f"{margin.mean():.1e}", f"{margin.max():.1e}"]
        if "distance" in values:
            cells += [f"{values['distance'].mean():.1e}", f"{values['distance'].max():.1e}"]
        else:
            cells += ["", ""]
        return "| " + " | ".join(cells) + " |"

    table = "\n".join(
        [
            row("fpo, shuffled, sequences of the default length", own[0]),
            row("fpo, shuffled, sequences of 512 tokens", own[1]),
            row("TRL, shuffled, batches of 4", other),
        ]
    )
    name = "ONEDNN_MAX_CPU_ISA"
    words = f"--pairs {arguments.pairs}"
    words += f" --page {arguments.page}" if arguments.page != "noise" else ""
    instructions = f"{name}={os.environ[name]} " if name in os.environ else ""
    write_page(
        arguments.page,
        f"""# Noise at step 0, {datetime.now(UTC):%Y-%m-%d}

{store.meta["model"]["architecture"]}, bfloat16, policy = reference, {store.pairs} real pairs of at
most {arguments.max_length} tokens a sequence, {SEEDS} shuffles. The margin is a(w) - a(l) less the
reference's, in nats per token (u is β times it), and should be 0; so should D.

{machine()}
Command: `{instructions}python benchmarks/noise.py --data PAIRS.jsonl {words}`.

| | mean margin | largest | mean D | largest |
|---|---|---|---|---|
{table}

In fpo attention runs sequence by sequence, sums run response by response, and the rest works token
by token, so without AMX no part of a pair's arithmetic depends on its packed sequence. With AMX the
rounding of a product depends on the number of its rows, and on GPUs it may. The default length is
2,048 tokens. D is not exactly 0 where the stored value and the policy's are sums of different
products (`features/encoder.py: pool`, `columns`).
""",
    )


if __name__ == "__main__":
    main()
