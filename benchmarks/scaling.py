"""The tables of docs/scaling.md: memory, tokens/s, hours and bytes, stragglers and lost nodes.

    .venv/bin/python benchmarks/scaling.py

Arithmetic alone, for Gemma-2 on H100s; nothing is run. The formulas are checked against what is
measured by benchmarks/host_memory.py (memory), ranks.py (bytes of a store, balance of the ranks).
"""

import argparse
import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from common import table

from fpocli.store.schema import TOKENS_PER_CHUNK, raw_bytes

GPUS = (1, 8, 64)
PAIRS = (60_000, 1_000_000, 10_000_000)
# Of a pair: prompt, chosen, rejected, in tokens.
LENGTHS = (160, 280, 280)
TOKENS = sum(LENGTHS)
PACKED = 8192  # tokens of a packed sequence on a GPU
BUCKET = 2**25  # engine.py: elements of a group of parameters, and of a gradient bucket
PEAK = 989e12  # FLOP/s of an H100 in bfloat16
# Share of the peak: measured (benchmarks/results, gpu) and assumed, of training and of caching.
EFFICIENCY = {"measured": (0.139, 0.246), "assumed": (0.40, 0.40)}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Args:
        parameters: P.
        layers: of the decoder.
        width: d.
        middle: width of the MLP.
        queries: heads times their size.
        vocabulary: V.
    """

    parameters: int
    layers: int
    width: int
    middle: int
    queries: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any, parameters: int) -> Self:
        """From transformers' configuration."""
        return cls(
            parameters,
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads * config.head_dim,
            config.vocab_size,
        )


MODELS = {
    "2B": Shape(2_614_341_888, 26, 2304, 9216, 2048, 256_000),
    "9B": Shape(9_241_705_984, 42, 3584, 14336, 4096, 256_000),
    "27B": Shape(27_227_128_320, 46, 4608, 36864, 4096, 256_000),
}


def held_bytes(shape: Shape, stage: int, ranks: int) -> float:
    """What a rank holds between two steps: bfloat16 weights, float32 master weights and Adam's two
    moments; under ZeRO-3 also the gradients' buffer and a bucket, which are kept."""
    weights, states, gradients = (2 * shape.parameters, 12 * shape.parameters, 0)
    if stage >= 1:
        states /= ranks
    if stage == 3:
        weights, gradients = weights / ranks, 2 * shape.parameters / ranks + 2 * BUCKET
    return weights + states + gradients


def step_bytes(
    shape: Shape,
    stage: int,
    ranks: int,
    length: int = PACKED,
    chunk: int = 2**28,
    features: int = 16_384,
) -> float:
    """What a step needs besides, at most.

    Args:
        shape, stage, ranks: as for `held_bytes`.
        length: tokens of a packed sequence.
        chunk: bytes of a chunk of logits in float32 (head.py).
        features: of the SAE, 0 without one.
    """
    embedding = shape.vocabulary * shape.width
    part = ranks if stage else 1
    gradients = {0: 2.0, 1: 2.0, 2: 2 / ranks, 3: 0.0}[stage] * shape.parameters
    # Two buckets of gradients in bfloat16, and the float32 gradient of the largest group.
    gradients += 2 * (1 if stage == 3 else 2) * BUCKET + 4 * max(BUCKET, embedding) / part
    # Each layer's input is kept; the layer that is recomputed has all its activations.
    kept = 2 * length * shape.width * shape.layers
    layer = 2 * length * (8 * shape.width + 4 * shape.queries + 4 * shape.middle)
    # Logits, their soft-cap and softmax; the head's gradient and a chunk's part of it.
    head = 4 * chunk + 2 * 2 * embedding
    sae = 4 * shape.width * features + 3 * 4 * 2048 * features
    # DeepSpeed holds at most a billion gathered parameters.
    gathered = 2 * min(shape.parameters, max(1e9, embedding)) if stage == 3 else 0.0
    return gradients + kept + layer + head + sae + gathered


def operations(shape: Shape, backward: bool) -> float:
    """FLOPs of a token: 2 a parameter forward and 4 backward, and attention to about half of the
    own sequence. Recomputation is not counted as work."""
    context = (LENGTHS[0] + LENGTHS[1]) / 2
    forward = 2 * shape.parameters + 4 * shape.layers * shape.queries * context
    return (3 if backward else 1) * forward


def speed(shape: Shape, efficiency: float, backward: bool) -> float:
    """Tokens a second of a GPU."""
    return efficiency * PEAK / operations(shape, backward)


def store_attributes(
    pairs: int, tokens: int, scored: int, distributions: int = 0
) -> dict[str, Any]:
    """The attributes that decide the size of a store with one site: 16,384 features, K = 256."""
    about = {"d_sae": 16_384, "k": 256, "value_dtype": "float32"}
    meta: dict[str, Any] = {
        "pairs": {"kept": pairs}, "block": 1024, "tokens": tokens, "sites": {"site": about}
    }  # fmt: skip
    if distributions:
        rows = {"scored": scored, "padded": scored, "chunk": TOKENS_PER_CHUNK, "shard": 2**18}
        meta["distributions"] = {"n": distributions, "dtype": "float32", "vocabulary": 256_000}
        meta["distribution_rows"] = rows
    return meta


def store_bytes(pairs: int, distributions: int = 0) -> int:
    """Size of a store before compression."""
    scored = pairs * (LENGTHS[1] + LENGTHS[2])
    return raw_bytes(store_attributes(pairs, pairs * TOKENS, scored, distributions))


def slowest(ranks: int, sigma: float, steps: int = 2000) -> float:
    """Mean over steps of the slowest of `ranks`, whose times are log-normal with mean 1."""
    rng = np.random.default_rng(0)
    times = rng.lognormal(-(sigma**2) / 2, sigma, (steps, ranks))
    return float(times.max(1).mean())


def best_interval(save: float, between: float) -> float:
    """Young's interval between checkpoints, in hours.

    Args:
        save: hours to write one.
        between: mean hours between failures of the whole job.
    """
    return math.sqrt(2 * save * between)


def lost_share(interval: float, save: float, restart: float, between: float) -> float:
    """Share of the time that checkpoints, lost work and restarts take (Young, first order)."""
    return save / interval + (interval / 2 + restart) / between


def simulate_failures(
    work: float, interval: float, save: float, restart: float, between: float, runs: int = 400
) -> float:
    """The same share by simulation: exponential failures, work since the last checkpoint lost."""
    rng = np.random.default_rng(0)
    total = 0.0
    for _ in range(runs):
        done, clock, failure = 0.0, 0.0, rng.exponential(between)
        while done < work:
            piece = min(interval, work - done)
            if clock + piece + save <= failure:
                clock += piece + save
                done += piece
            else:
                clock = max(clock, failure) + restart
                failure = clock + rng.exponential(between)
        total += clock
    return total / runs / work - 1


def hours(value: float) -> str:
    """Such as "12 min", "3.4 h", "210 h"."""
    if value < 1:
        return f"{60 * value:.0f} min"
    return f"{value:.1f} h" if value < 100 else f"{value:,.0f} h"


def size(value: float) -> str:
    """Such as "207 MB", "3.4 GB"."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value / 1e3:.3g} kB"


def memory_table() -> str:
    """GB per GPU under each ZeRO stage: held, and at most."""
    rows = []
    for name, shape in MODELS.items():
        for gpus in GPUS:
            cells = []
            for stage in (2, 3):
                held = held_bytes(shape, stage, gpus)
                most = held + step_bytes(shape, stage, gpus)
                fits = " **fits**" if most < 0.9 * 80e9 else ""
                cells.append(f"{held / 1e9:,.0f}, {most / 1e9:,.0f}{fits}")
            offload = 2 * shape.parameters / gpus + step_bytes(shape, 3, gpus)
            # Master weights, moments and float32 gradients.
            host = 16 * shape.parameters / gpus * min(gpus, 8)
            rows.append([name, str(gpus), *cells, f"{offload / 1e9:,.0f}", f"{host / 1e9:,.0f}"])
    heads = ("model", "GPUs", "ZeRO-2: held, most", "ZeRO-3: held, most",
             "ZeRO-3, optimiser on the CPU: most", "then per host of 8")  # fmt: skip
    return table(heads, rows)


def time_table() -> str:
    """Tokens/s and hours of training and of caching."""
    rows = []
    for name, shape in MODELS.items():
        for gpus in GPUS:
            cells = []
            for training, caching in EFFICIENCY.values():
                rate = gpus * speed(shape, training, backward=True)
                cached = gpus * speed(shape, caching, backward=False)
                cells.append(f"{rate:,.0f}")
                cells.append(", ".join(hours(pairs * TOKENS / rate / 3600) for pairs in PAIRS))
                cells.append(", ".join(hours(pairs * TOKENS / cached / 3600) for pairs in PAIRS))
            rows.append([name, str(gpus), *cells])
    heads = ["model", "GPUs"]
    for training, caching in EFFICIENCY.values():
        heads += [
            f"tokens/s at {training:.0%}",
            "hours of an epoch",
            f"of caching at {caching:.0%}",
        ]
    return table(heads, rows)


def byte_table() -> str:
    """Bytes of a store, before compression, and of what a run writes."""
    rows = [
        [f"{pairs:,}", size(store_bytes(pairs)), size(store_bytes(pairs, 64))] for pairs in PAIRS
    ]
    return table(("pairs", "with features", "and distributions of 64 tokens"), rows)


def straggler_table(sigmas: tuple[float, ...]) -> str:
    """Time of a step over that of one rank."""
    rows = [[f"{sigma:.2f}", *(f"{slowest(gpus, sigma):.2f}" for gpus in GPUS)] for sigma in sigmas]
    return table(("spread of a rank's time", *(f"{n} GPUs" for n in GPUS)), rows)


def failure_table(between: float, restart: float, rate: float) -> str:
    """Young's interval and what is lost, by formula and by simulation.

    Args:
        between: mean hours between failures of one node of 8 GPUs.
        restart: hours from a failure to the next step.
        rate: bytes a second at which all ranks of a node together write a checkpoint.
    """
    rows = []
    for name, shape in MODELS.items():
        for nodes in (1, 8):
            save = 12 * shape.parameters / (rate * nodes) / 3600
            mean = between / nodes
            interval = best_interval(save, mean)
            share = lost_share(interval, save, restart, mean)
            simulated = simulate_failures(20 * mean, interval, save, restart, mean)
            rows.append(
                [name, str(8 * nodes), f"{save * 3600:.0f} s", hours(interval), f"{share:.2%}",
                 f"{simulated:.2%}"]
            )  # fmt: skip
    heads = ("model", "GPUs", "a checkpoint takes", "best interval", "lost, formula", "simulated")
    return table(heads, rows)


def main() -> None:
    """Print all tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--between", type=float, default=6000, help="hours between a node's failures"
    )
    parser.add_argument("--restart", type=float, default=0.25, help="hours")
    parser.add_argument("--write", type=float, default=1e9, help="bytes/s of a node")
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    arguments = parser.parse_args()
    for text in (
        memory_table(),
        time_table(),
        byte_table(),
        straggler_table(tuple(arguments.sigma)),
        failure_table(arguments.between, arguments.restart, arguments.write),
    ):
        print(text, end="\n\n")


if __name__ == "__main__":
    main()
