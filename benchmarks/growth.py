"""How the cost of a packed sequence grows with K, m, vocabulary, length and number of pairs.

    .venv/bin/python benchmarks/growth.py

A small Llama of random weights (6 layers, 384 wide) in bfloat16, forward and backward of one
packed sequence; fpo and simpo alternate. One size changes at a time; nothing needs to be
downloaded.
"""

import argparse
import statistics
import tempfile
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from common import by_turns, machine, random_sae, write_page

BASE = {"K": 256, "m": 16_384, "vocabulary": 49_152, "length": 128, "pairs": 2}
SIZES = {
    "K": (64, 256, 1024),
    "m": (4_096, 16_384, 65_536),
    "vocabulary": (16_384, 49_152, 131_072),
    "length": (64, 128, 512),
    "pairs": (1, 2, 4),
}
WIDTH, ROUNDS = 384, 3


def main() -> None:
    """Change one size after the other and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="one small size, to see that it runs")
    tiny = parser.parse_args().tiny
    base = dict.fromkeys(BASE, 8) | {"m": 512, "vocabulary": 300, "pairs": 1} if tiny else BASE
    sizes_of = {"K": (16,)} if tiny else SIZES
    rows = []
    for name, sizes in sizes_of.items():
        for size in sizes:
            times = measure(**(base | {name: size}))
            fpo, simpo = (statistics.median(times[method]) for method in ("fpo", "simpo"))
            ratio = statistics.median(
                a / b for a, b in zip(times["fpo"], times["simpo"], strict=True)
            )
            rows.append(f"| {name} | {size:,} | {simpo:.2f} | {fpo:.2f} | {ratio:.3f} |")
            print(rows[-1])
    report(rows)


def measure(K: int, m: int, vocabulary: int, length: int, pairs: int) -> dict[str, list[float]]:
    """Seconds by method, alternating.

    Args:
        K: features in the store.
        m: features of the SAE.
        vocabulary: of the model.
        length: tokens of a response; the prompt has a quarter of it.
        pairs: in the sequence.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from fpocli.config import TrainConfig
    from fpocli.data.pairs import TokenPair
    from fpocli.features.encoder import top_k
    from fpocli.features.pretrained import load_encoder
    from fpocli.features.site import Site
    from fpocli.features.top_features import TopFeatures
    from fpocli.model.attention import length_multiple
    from fpocli.model.language_model import LanguageModel
    from fpocli.model.network import choose_device
    from fpocli.model.packing import pack
    from fpocli.scoring.score import score
    from fpocli.store.records import ReferenceValues
    from fpocli.training.objective import objective

    device = choose_device(None)
    torch.manual_seed(0)
    shape = {
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 6,
        "num_attention_heads": 6, "vocab_size": vocabulary, "max_position_embeddings": 4096,
    }  # fmt: skip
    site = Site(4, "resid_post")
    network: Any = LlamaForCausalLM(LlamaConfig(**shape)).to(device, torch.bfloat16)
    network.activation_checkpointing_enable()
    model = LanguageModel(network, [site]).train()
    rng = np.random.default_rng(0)
    made = [
        TokenPair(*(rng.integers(0, vocabulary, n) for n in (length // 4, length, length)))
        for _ in range(pairs)
    ]
    batch = pack(made, length_multiple(device)).to(device)
    with tempfile.TemporaryDirectory() as folder:
        encoder = load_encoder(random_sae(folder, WIDTH, m), device)
    index, value = top_k(torch.rand(pairs, 2, m, device=device), K)
    nonzero = torch.full((pairs, 2), m, device=device)
    reference = ReferenceValues(
        logp=torch.zeros(pairs, 2, device=device),
        margin=torch.zeros(pairs, device=device),
        features={str(site): TopFeatures(index, value, nonzero, value[..., :0], index[0, 0, :0])},
    )
    ways = {"simpo": {}, "fpo": {str(site): encoder}}

    def work(method: str, row: Any) -> None:
        settings = TrainConfig(cache="unused", method=method)
        scores = score(model, ways[method], row)
        loss, _ = objective(scores, reference, ways[method], settings)
        loss.mean().backward()
        loss.mean().item()
        model.zero_grad()

    seconds, _ = by_turns(ways, [batch] * ROUNDS, work)
    return seconds


def report(rows: list[str]) -> None:
    """The page."""
    table = "\n".join(rows)
    base = ", ".join(f"{name} {size:,}" for name, size in BASE.items())
    write_page(
        "growth",
        f"""# How cost grows, {datetime.now(UTC):%Y-%m-%d}

Forward and backward of one packed sequence, bfloat16, a Llama of random weights (6 layers, {WIDTH}
wide). Responses of `length` tokens, prompts of a quarter of it. Unless stated otherwise: {base};
k = 50. Median of {ROUNDS} rounds, the methods alternating.

{machine()}
Command: `python benchmarks/growth.py`.

| size | | simpo s | fpo s | fpo / simpo |
|---|---|---|---|---|
{table}

The model is small, so the SAE weighs more here than in a large one: the encoder costs
2 d m operations a position, the model 2 a weight and token.
""",
    )


if __name__ == "__main__":
    main()
