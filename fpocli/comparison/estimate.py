"""What the commands of a grid will take, from counted tokens: hours and bytes, for `--plan`.

The hours are arithmetic over an assumed speed: 2 operations per parameter and token of a forward
pass, 4 of a backward pass, at `tflops` useful TFLOP/s per process. docs/evaluation.md says more.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice

from rich.filesize import decimal

from fpocli.comparison.grid import Grid
from fpocli.comparison.steps import Step, processes
from fpocli.comparison.store_size import SAMPLE, StoreSize, measure_store
from fpocli.config import EvalConfig, TrainConfig
from fpocli.data.sources import open_source
from fpocli.evaluation.prompts import load_prompts
from fpocli.model.network import count_parameters
from fpocli.system.console import warn
from fpocli.system.errors import UserError
from fpocli.system.model_folder import find_model

# Useful TFLOP/s of a process where the grid names none: half of an A100's, a sixth of an H100's.
_TFLOPS = 150.0
# A step of generation reads all weights, at one byte per 150 operations, and has a fixed cost.
_OPERATIONS_PER_BYTE, _DECODING_STEP = 150, 0.03
# Bytes per parameter: of a bfloat16 model, and of a checkpoint with master weights and moments.
_WEIGHTS, _CHECKPOINT = 2, 14


@dataclass(frozen=True)
class Cost:
    """What a command is expected to take; None where it cannot be told.

    Args:
        hours: of all processes together working side by side.
        bytes: written at most.
    """

    hours: float | None
    bytes: int | None

    def hours_text(self) -> str:
        """Such as "1.5 h" or "12 min"."""
        if self.hours is None:
            return "?"
        minutes = 60 * self.hours
        return f"{self.hours:.1f} h" if minutes >= 100 else f"{max(minutes, 0.1):.2g} min"

    def size_text(self) -> str:
        """Such as "1.5 GB"."""
        return "?" if self.bytes is None else decimal(self.bytes)


def estimate_costs(grid: Grid) -> Iterator[tuple[Step, Cost]]:
    """The expected cost of every command, in order. What cannot be told is said on stderr."""
    ranks = processes(grid.file.launch)
    speed = 1e12 * (grid.file.tflops or _TFLOPS) * ranks
    stores = {step.settings["out"]: step for step in grid.stores}
    counted: dict[str, StoreSize | None] = {}

    def count(path: str) -> StoreSize | None:
        if path not in counted:
            try:
                counted[path] = measure_store(path, stores.get(path))
            except UserError as error:
                warn(f"no estimate for {path}: {error}")
                counted[path] = None
        return counted[path]

    for step in grid.steps:
        if step.kind == "sft":
            yield step, _sft(step, speed)
            continue
        found = count(step.settings["out" if step.kind == "cache" else "cache"])
        if found is None:
            yield step, Cost(None, None)
        elif step.kind == "cache":
            # One encoding per position and site.
            per_token = 2 * found.parameters + 2 * found.width * sum(found.features)
            yield step, Cost(per_token * found.tokens / speed / 3600, found.bytes)
        elif step.kind == "train":
            trained = TrainConfig(**step.settings)
            other = count(trained.eval_cache) if trained.eval_cache else None
            yield step, _train(trained, found, other, speed)
        else:
            config = EvalConfig(**step.settings)
            seconds = _scoring(config, _held_out(step), found) / speed
            seconds += _sampling(config, found, speed, ranks)
            yield step, Cost(seconds / 3600, 0)


def _held_out(step: Step) -> float:
    """The share of the pairs that the policy of an evaluation was not trained on."""
    if step.after and step.after.kind == "train":
        return TrainConfig(**step.after.settings).eval_fraction
    return EvalConfig(**step.settings).eval_fraction


def _train(config: TrainConfig, found: StoreSize, other: StoreSize | None, speed: float) -> Cost:
    passes = 8 if config.activation_checkpointing else 6
    if config.lora_rank:
        # The frozen weights have no gradient.
        passes -= 2
    # Of all tokens of the store; those of --eval-cache come on top.
    held_out = other.tokens / found.tokens if other else config.eval_fraction
    steps = config.epochs * found.pairs // config.batch_size
    epochs: float = config.epochs
    if config.max_steps and config.max_steps < steps:
        epochs *= config.max_steps / steps
    # Without distributions in the store, the reference runs as well.
    with_reference = 0 if found.distributions and not config.exact_kl else 2
    trained = with_reference if config.needs_kl else 0
    per_token = (passes + trained) * found.parameters * epochs * (1 - config.eval_fraction)
    # The held-out pairs, before and after, with the reference if the KL is measured.
    times = 2
    if config.eval_every:
        times += int(epochs * found.pairs) // (config.batch_size * config.eval_every)
    measured = with_reference if config.needs_kl or config.measure_kl else 0
    per_token += times * held_out * (2 + measured) * found.parameters
    kept = config.keep_checkpoints if steps > config.save_every else 0
    # A checkpoint of an adapter is small.
    checkpoint = 0 if config.lora_rank else _CHECKPOINT
    kept += config.best is not None
    size = found.parameters * (_WEIGHTS + kept * checkpoint)
    return Cost(per_token * found.tokens / speed / 3600, size)


def _scoring(config: EvalConfig, held_out: float, found: StoreSize) -> float:
    """Operations of measuring the pairs."""
    share = {"eval": held_out, "train": 1 - held_out, "all": 1.0}
    part = share[config.split or ("eval" if held_out else "all")]
    return part * found.tokens * (4 if config.reference else 2) * found.parameters


def _sampling(config: EvalConfig, found: StoreSize, speed: float, ranks: int) -> float:
    """Seconds of sampling, if every answer has the most tokens."""
    try:
        asked = load_prompts(config)
    except UserError as error:
        warn(f"without the time of sampling: {error}")
        return 0.0
    seconds = 0.0
    read = _WEIGHTS * found.parameters * _OPERATIONS_PER_BYTE / (speed / ranks)
    for one in asked:
        batches = -(-len(one.prompts) // config.batch_size) * len(one.temperatures)
        turns = max(len(prompt.turns) for prompt in one.prompts)
        seconds += -(-batches // ranks) * turns * one.max_new_tokens * max(read, _DECODING_STEP)
    return seconds


def _sft(step: Step, speed: float) -> Cost:
    """TRL's stage: forward, backward and recomputation of the conversations, once per epoch."""
    settings = step.settings
    try:
        folder = find_model(str(settings["model"]), weights=False)
        size = count_parameters(folder)
        tokens = _count_conversations(
            str(settings.get("data", "HuggingFaceH4/ultrachat_200k")),
            settings.get("split"), settings.get("limit"), str(folder.path),
        )  # fmt: skip
    except (UserError, KeyError) as error:
        warn(f"no estimate for the SFT stage: {error}")
        return Cost(None, None)
    tokens *= float(settings.get("num_train_epochs", 1))
    return Cost(8 * size * tokens / speed / 3600, 4 * size)


@cache
def _count_conversations(data: str, split: str | None, limit: int | None, folder: str) -> float:
    """Tokens of all conversations, extrapolated from the first ones."""
    from transformers import AutoTokenizer

    default = "train_sft" if data == "HuggingFaceH4/ultrachat_200k" else None
    rows = open_source(data, split or default, limit).rows()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sample = [row for _, row in islice(rows, SAMPLE)]
    texts = ["\n".join(str(turn["content"]) for turn in row["messages"]) for row in sample]
    tokens = sum(len(ids) for ids in tokenizer(texts).input_ids)
    count = len(sample) + sum(1 for _ in rows)
    return tokens / max(len(sample), 1) * count
