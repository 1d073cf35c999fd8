"""What is said before the first step."""

import torch

from fpocli.config import TrainConfig
from fpocli.store.reader import Store
from fpocli.system.console import say, warn
from fpocli.system.ranks import Ranks
from fpocli.training.pair_loader import PairLoader
from fpocli.training.schedule import warmup_steps


def announce(
    settings: TrainConfig,
    store: Store,
    loader: PairLoader,
    held_out: PairLoader,
    done: int,
    steps: int,
    device: torch.device,
    kernels: str,
) -> None:
    """Say what is trained, on what and how.

    Args:
        settings: of the run.
        store: the reference.
        loader: of the training pairs.
        held_out: of the held-out ones.
        done, steps: how many steps are done, and how many there are.
        device: where the policy is.
        kernels: how it is computed, in words.
    """
    world = Ranks.connected().world
    say(
        f"{settings.method}{_kl_text(settings, store)} on {loader.training_pairs:,} pairs, "
        f"{held_out.held_out_pairs:,} held out; steps {done} to {steps} of "
        f"{settings.batch_size} pairs, packed into sequences of {loader.packed_length:,} tokens; "
        f"{world} {device.type} process{'es' if world > 1 else ''}, ZeRO {settings.zero}; {kernels}"
    )
    if warmup_steps(steps, settings) > steps:
        warn(
            f"note: the warm-up of {warmup_steps(steps, settings)} steps is longer than the run, "
            f"so the learning rate never reaches {settings.lr}"
        )


def _kl_text(settings: TrainConfig, store: Store) -> str:
    """Where the KL of the constraint comes from, for a message; nothing without it."""
    if not settings.needs_kl:
        return ""
    if store.distributions is None or settings.exact_kl:
        beside = settings.lora_rank is None or settings.model is not None
        return " with the reference in memory" if beside else " to the policy without its adapter"
    return f" with {store.distributions.words} of the store"
