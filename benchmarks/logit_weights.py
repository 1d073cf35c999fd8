"""Is D nearer to the KL with weights by the features' effect on the logits?

    .venv/bin/python benchmarks/logit_weights.py --data PAIRS.jsonl --layer 7 19 24 \
        --sae demo/sae-7 demo/sae-19 demo/sae

Trains dpo_norm, which constrains nothing, on all pairs once at each learning rate, and measures the
exact sequential KL and D of every response with three weights of the features: 1; the variance of
their effect on the logits over all tokens alike; and over tokens as often as they occur in the
store, which is `--feature-weights logits`. Defaults are the demo's model and SAE (run `make demo`
first) and this repository's pairs.

Shapes: N pairs; column 0 is chosen, column 1 rejected.
"""

import argparse
import gc
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from common import BATCH, load_encoders, machine, make_store, measure_parser, table, write_page

from fpocli.evaluation.summary import consistency

# By name of the weights its heading.
WEIGHTS = {
    "plain": "1",
    "uniform": "logits, tokens alike",
    "logits": "logits, tokens as they occur",
}


def main() -> None:
    """Train, measure and write the page."""
    parser = measure_parser(__doc__)
    parser.add_argument("--layer", type=int, nargs="+", default=[24])
    parser.add_argument("--sae", nargs="+", default=["demo/sae"])
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-5, 1e-4])
    parser.set_defaults(features=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(
            arguments, folder, arguments.pairs, layer=arguments.layer, sae=arguments.sae,
            dtype=arguments.dtype,
        )  # fmt: skip
        found = {
            lr: measure(arguments, store, policy_of(arguments, store, folder, lr))
            for lr in arguments.lr
        }
        report(arguments, store, found)


def policy_of(arguments: argparse.Namespace, store: Any, folder: str, lr: float) -> Path:
    """Train on all pairs once; the policy's folder."""
    from fpocli import TrainConfig, train

    config = TrainConfig(
        cache=str(store.path), method="dpo_norm", batch_size=BATCH, lr=lr, warmup=0,
        bf16=arguments.dtype == "bfloat16", out=f"{folder}/{lr:g}",
    )  # fmt: skip
    final = train(config)
    # The engine is part of cycles.
    gc.collect()
    return final


def measure(arguments: argparse.Namespace, store: Any, policy: Path) -> dict[str, np.ndarray]:
    """Of every response, [N, 2]: "kl" in nats, its "tokens", and D by site and weights, such as
    layer_24.resid_post/plain."""
    import torch

    from fpocli.features.site import Site
    from fpocli.model.language_model import load_model
    from fpocli.model.network import choose_device
    from fpocli.model.packing import default_packed_length
    from fpocli.scoring.loading import load_reference
    from fpocli.scoring.logit_weights import logit_weights, token_counts
    from fpocli.scoring.score import score
    from fpocli.system.model_folder import find_model
    from fpocli.training.objective import compare_features
    from fpocli.training.pair_loader import PairLoader

    device, dtype = choose_device(None), getattr(torch, arguments.dtype)
    sites = [Site.parse(name) for name in store.sites]
    model = load_model(find_model(str(policy)), sites, dtype, device).eval()
    reference = load_reference(find_model(arguments.model), [], dtype, device)
    sources = dict(zip(store.sites, arguments.sae, strict=True))
    alike, named = (
        logit_weights(sources, model.network, tokens)
        for tokens in (torch.ones(model.vocabulary), token_counts(store, model.vocabulary))
    )
    encoders = load_encoders(store, device)
    loader = PairLoader(
        store, batch_size=BATCH, packed_length=default_packed_length(device), eval_fraction=0,
        seed=0, rank=0, world=1,
    )  # fmt: skip
    found: dict[str, list[np.ndarray]] = {}
    with torch.inference_mode():
        for micro in loader.evaluation(device, "all"):
            scores = score(model, encoders, micro.batch, reference(micro.batch))
            values = {"kl": scores.kl, "tokens": scores.count}
            for name, weights in zip(WEIGHTS, ({}, alike, named), strict=True):
                _, distances = compare_features(scores, micro.reference, encoders, 50, weights)
                values |= {f"{site}/{name}": value for site, value in distances.items()}
            for name, value in values.items():
                found.setdefault(name, []).append(value.double().cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def correlations(found: dict[str, np.ndarray], name: str) -> list[str]:
    """Pearson and Spearman of D with the KL per token, over responses and over margins, as fpo eval
    has them."""
    parts = consistency(found[name], found["kl"] / found["tokens"])
    return [f"{value:.3f}" for part in parts.values() for value in part.values()]


def report(
    arguments: argparse.Namespace, store: Any, found: dict[float, dict[str, np.ndarray]]
) -> None:
    """The page."""
    heads = (
        "learning rate", "KL, nats per token", "site", "weights of the features",
        "responses: Pearson", "Spearman", "margins: Pearson", "Spearman",
    )  # fmt: skip
    rows = [
        (
            f"{lr:g}", f"{values['kl'].sum() / values['tokens'].sum():.4f}", site, title,
            *correlations(values, f"{site}/{name}"),
        )
        for lr, values in found.items()
        for site in store.sites
        for name, title in WEIGHTS.items()
    ]  # fmt: skip
    write_page(
        "logit-weights",
        f"""# D and the KL, with weights by the effect on the logits, {datetime.now(UTC):%Y-%m-%d}

{store.meta["model"]["architecture"]}, {arguments.dtype}, dpo_norm trained once on {store.pairs}
real pairs of at most {arguments.max_length} tokens a sequence in batches of {BATCH}, and measured
on the same pairs. Correlations of D with the exact KL per token, over the {2 * store.pairs}
responses and over the {store.pairs} margins. The standard error of a
correlation near 0 is {(2 * store.pairs) ** -0.5:.2f} over responses and
{store.pairs**-0.5:.2f} over margins, less near 1.

{machine()}
Command: `python benchmarks/logit_weights.py --data PAIRS.jsonl --pairs {arguments.pairs} --layer {
            " ".join(map(str, arguments.layer))
        } --sae ... --dtype {arguments.dtype}`.

{table(heads, rows)}
""",
    )


if __name__ == "__main__":
    main()
