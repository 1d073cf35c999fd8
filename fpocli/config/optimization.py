"""The settings of fpo train that say how it is minimised, and on what hardware."""

from dataclasses import dataclass
from typing import Annotated, Literal

from typer import Option

from fpocli.config.shared import DEVICE, PACKED_LENGTH_HELP


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """The optimiser, its schedule and the batches."""

    HEADING = "Optimisation"

    optimizer: Annotated[
        Literal["adamw", "rmsprop"],
        Option(help="Optimiser. adamw with weight decay 0 is Adam, as in the paper."),
    ] = "adamw"
    lr: Annotated[float, Option(min=0, help="Peak learning rate.")] = 5e-7
    weight_decay: Annotated[float, Option(min=0, help="Weight decay, decoupled for adamw.")] = 0.0
    schedule: Annotated[
        Literal["constant", "cosine", "linear"], Option(help="Learning rate after the warm-up.")
    ] = "constant"
    warmup: Annotated[
        float, Option(min=0, help="Steps of linear warm-up; below 1, a share of all steps.")
    ] = 150.0
    epochs: Annotated[int, Option(min=1, help="Passes over the training pairs.")] = 1
    max_steps: Annotated[
        int | None,
        Option(
            min=1,
            help="End the run after so many steps, if the passes have more. The schedule ends "
            "there as well.",
        ),
    ] = None
    batch_size: Annotated[int, Option(min=1, help="Pairs per optimiser step, over all ranks.")] = 32
    grad_clip: Annotated[float, Option(min=0, help="Gradient norm to clip to; 0 is off.")] = 10.0
    seed: Annotated[
        int, Option(help="Seed of the order of the pairs, and of a LoRA adapter at its start.")
    ] = 0


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Where the policy runs and how its memory is used."""

    HEADING = "Hardware and memory"

    bf16: Annotated[
        bool, Option(help="bfloat16 weights with float32 master weights, or float32 throughout.")
    ] = True
    activation_checkpointing: Annotated[
        bool, Option(help="Recompute activations in the backward pass.")
    ] = True
    packed_length: Annotated[int | None, Option(min=1, help=PACKED_LENGTH_HELP)] = None
    zero: Annotated[int, Option(min=0, max=3, help="DeepSpeed ZeRO stage.")] = 2
    deepspeed: Annotated[
        str | None,
        Option(
            help="DeepSpeed JSON file with additional settings. A value that contradicts a flag is "
            'an error; "auto" keeps the flag\'s.'
        ),
    ] = None
    device: Annotated[str | None, DEVICE] = None
    gpus: Annotated[
        int | None,
        Option(
            min=1,
            help="Start one process for each of so many GPUs of this machine, by torchrun; with "
            "--device cpu, so many processes. Default: this process alone, or those of the "
            "launcher that started it.",
        ),
    ] = None
