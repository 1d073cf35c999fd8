"""Train a top-k SAE of sae-lens on a model's own activations, in a minute or two on a CPU:

    python examples/train_sae.py --model MODEL --layer 24 --data PAIRS.jsonl --out sae

The activations are those of the residual stream after a layer, on the chosen answers. A few dozen
texts give an SAE to try things with. One whose features are to be read needs millions of tokens:
https://decoderesearch.github.io/SAELens trains such, and fpo reads what it saves.
"""

import argparse
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

# Set before DeepSpeed looks for a GPU and warns.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from rich.console import Console

from fpocli.system.console import progress

STEPS, BATCH, FEATURES, ACTIVE = 500, 256, 2048, 32
out = Console(highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Train on the first rows of a file with `prompt` and `chosen`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a hub id or a local folder")
    parser.add_argument("--layer", required=True, type=int, help="decoder layer, from 0")
    parser.add_argument("--data", required=True, type=Path, help="JSONL with prompt and chosen")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument("--texts", default=64, type=int, help="rows to read")
    parser.add_argument("--steps", default=STEPS, type=int, help=f"of {BATCH} positions")
    given = parser.parse_args()
    torch.manual_seed(0)
    with given.data.open() as lines:
        rows = [json.loads(line) for line in islice(lines, given.texts)]
    activations = collect_activations(given.model, given.layer, rows)
    train_sae(activations, given.model, given.layer, given.out, given.steps)


def collect_activations(model: str | Path, layer: int, rows: list[dict[str, str]]) -> torch.Tensor:
    """The residual stream after a layer on the chosen answers of pairs: [positions, width]."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    activations: list[torch.Tensor] = []
    hook = network.layers[layer].register_forward_hook(
        # The first position is an outlier in every text; SAEs leave it out.
        lambda module, inputs, output: activations.append(output[0, 1:])
    )
    with torch.inference_mode(), progress("Reading activations for the SAE", len(rows)) as bar:
        for row in rows:
            turns = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["chosen"]},
            ]
            network(**tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True))
            bar.advance()
    hook.remove()
    return torch.cat(activations)


def train_sae(
    activations: torch.Tensor, model: str | Path, layer: int, folder: Path, steps: int = STEPS
) -> None:
    """Train on the activations of a model's layer, say how good it is, and save it to a folder."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    def batches() -> Iterator[torch.Tensor]:
        while True:
            yield from activations[torch.randperm(len(activations))].split(BATCH)

    config = TopKTrainingSAEConfig(
        d_in=activations.shape[1],
        d_sae=FEATURES,
        k=ACTIVE,
        normalize_activations="expected_average_only_in",
    )
    config.metadata.hook_name = f"model.layers.{layer}"
    config.metadata.model_name = Path(model).name
    settings = SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=2e-3,
        lr_end=2e-4,
        lr_scheduler_name="cosineannealing",
        n_batches_for_norm_estimate=10,
    )
    sae = SAETrainer(settings, TopKTrainingSAE(config), batches()).fit()
    with torch.no_grad():
        left = (sae(activations) - activations).var(0).sum() / activations.var(0).sum()
    out.print(f"The SAE explains {1 - left:.0%} of the variance of layer {layer}.")
    sae.save_inference_model(folder)


if __name__ == "__main__":
    main()
