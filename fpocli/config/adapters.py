"""The settings of fpo train that say which weights are trained."""

from dataclasses import dataclass, field
from typing import Annotated

from typer import Option

from fpocli.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """LoRA: two small matrices beside each linear layer, in place of all weights."""

    HEADING = "LoRA"

    lora_rank: Annotated[
        int | None,
        Option(
            min=1,
            help="Train a LoRA adapter of this rank in place of all weights. Needs the extra lora.",
        ),
    ] = None
    # None without an adapter.
    lora_alpha: Annotated[
        int | None,
        Option(
            min=1, help="The adapter's output is scaled by this over the rank. Default: twice it."
        ),
    ] = None
    lora_target: Annotated[
        list[str],
        Option(
            metavar="MODULE",
            help="Linear layers that get an adapter, such as q_proj. Repeat for several. Default: "
            "all of the decoder, without experts.",
        ),
    ] = field(default_factory=list)
    load_in_4bit: Annotated[
        bool,
        Option(
            "--load-in-4bit",
            help="Hold the frozen linear layers in 4 bits (QLoRA). For a store that fpo cache "
            "--load-in-4bit made, or with --model. Needs the extra qlora.",
        ),
    ] = False

    def check_adapter(self, zero: int) -> None:
        """Complete the scale of the adapter.

        Args:
            zero: DeepSpeed's stage.

        Raises:
            UserError: two settings contradict each other, or one would have no effect.
        """
        if self.lora_rank is None:
            for flag, value in (
                ("--lora-alpha", self.lora_alpha),
                ("--lora-target", self.lora_target),
                ("--load-in-4bit", self.load_in_4bit),
            ):
                if value not in (None, [], False):
                    raise UserError(
                        f"{flag} is of an adapter, and none is trained",
                        "add --lora-rank, such as 16, or leave it out",
                    )
            return
        if self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", 2 * self.lora_rank)
        if self.load_in_4bit and zero == 3:
            raise UserError(
                "--load-in-4bit with --zero 3: weights in 4 bits cannot be partitioned",
                "use --zero 2; each rank then holds all of the 4-bit weights",
            )
