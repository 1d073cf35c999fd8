"""A LoRA adapter (arXiv 2106.09685) in a network, by PEFT, the only file that imports it.

A linear layer with the weights W [out, in] computes with W + s B A, where A [r, in] and B [out, r]
are trained, W is not, and s = alpha / r. B starts at 0, so training starts from W.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpocli.model.four_bit import dequantise
from fpocli.system.errors import UserError
from fpocli.system.model_folder import ModelFolder

# PEFT's name of an adapter that has no other.
_NAME = "default"


def require_peft() -> None:
    """Refuse to train an adapter where PEFT is not installed.

    Raises:
        UserError: it is not.
    """
    if not find_spec("peft"):
        raise UserError("--lora-rank needs the package peft", 'pip install "fpocli[lora]"')


class LoRA:
    """Puts an adapter into a network, in place, and freezes all other weights.

    Args:
        network: transformers' model with its head; its modules keep their names but for linear
            layers, which become `<name>.base_layer`.
        folder: of its weights, which adapter_config.json names.
        rank: r.
        alpha: of the scale.
        targets: names of the decoder's linear layers, or ends of them, such as q_proj; empty for
            all.
        seed: of A, which is the same on all ranks.

    Raises:
        UserError: the network has no such linear layers.
    """

    def __init__(
        self,
        network: Any,
        folder: ModelFolder,
        *,
        rank: int,
        alpha: int,
        targets: list[str],
        seed: int,
    ) -> None:
        from peft import LoraConfig, TaskType, get_peft_model

        network.name_or_path = folder.source
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=rank,
            lora_alpha=alpha,
            target_modules=_names(network, targets),
            revision=folder.revision,
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.random.default_generator.manual_seed(seed)
            # PEFT asks transformers by an old name whether activations are recomputed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            # It finds out by itself that GPT-2's weights are the transpose.
            warnings.filterwarnings("ignore", "fan_in_fan_out")
            # Of experts, which are refused below.
            warnings.filterwarnings("ignore", ".*_pattern keys", RuntimeWarning)
            # In the network's dtype, as all other weights; the optimiser's copy is float32.
            self._peft = get_peft_model(network, config, autocast_adapter_dtype=False)
        if config.target_parameters:
            raise UserError(
                f"PEFT would also train the experts of {type(network).__name__}, which fpo cannot "
                "merge",
                "name layers that are not in an MLP, such as --lora-target q_proj",
            )
        self._network, self._in_4bit = network, getattr(network, "is_quantized", False)

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained."""
        return [one for one in self._network.parameters() if one.requires_grad]

    @contextmanager
    def off(self) -> Iterator[None]:
        """The network without its adapter for a while, in evaluation mode."""
        training = self._network.training
        self._network.eval()
        try:
            with self._peft.disable_adapter():
                yield
        finally:
            self._network.train(training)

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the adapter as PEFT does, for `PeftModel.from_pretrained` onto the base model.

        Args:
            folder: to write.
            state: the network's state dict.
        """
        named = {f"base_model.model.{name}": value for name, value in state.items()}
        # False: neither embeddings nor the head are trained, so PEFT need not look for them.
        self._peft.save_pretrained(str(folder), state_dict=named, save_embedding_layers=False)

    def merge(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights W + s B A of the plain network, on the CPU, rounded once to W's dtype.

        The network is plain again afterwards, so that it can be saved with them.

        Args:
            state: the network's state dict.
        """
        from peft.tuners.lora import LoraLayer

        merged = dict(state)
        if self._in_4bit:
            dequantise(self._network, merged)
        for name, module in self._network.named_modules():
            if isinstance(module, LoraLayer):
                layer: Any = module
                a, b = (merged.pop(f"{name}.lora_{part}.{_NAME}.weight") for part in "AB")
                change = layer.scaling[_NAME] * (b.float() @ a.float()).cpu()
                for key in [key for key in merged if key.startswith(f"{name}.base_layer.")]:
                    merged[key.replace(".base_layer.", ".")] = merged.pop(key)
                weight = merged[f"{name}.weight"].cpu()
                # GPT-2 has the transpose.
                change = change.T if layer.fan_in_fan_out else change
                merged[f"{name}.weight"] = (weight.float() + change).to(weight.dtype)
        self._peft.unload()
        if self._in_4bit:
            self._network.hf_quantizer.remove_quantization_config(self._network)
        return merged


def _names(network: Any, targets: list[str]) -> list[str]:
    """The linear layers of the decoder that targets name. The head is none of them, and neither are
    layers that see images, or experts, which are no linear layers in transformers.

    Raises:
        UserError: a target names none; the hint has those that there are.
    """
    from transformers.pytorch_utils import Conv1D

    within = set(network.get_decoder().modules())
    linear = [
        name
        for name, module in network.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module in within
    ]
    ends = {target: [n for n in linear if f".{n}".endswith(f".{target}")] for target in targets}
    for target, found in ends.items():
        if not found:
            there = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise UserError(
                f"--lora-target {target}: {type(network).__name__} has no such linear layer in its "
                "decoder",
                f"it has {there}",
            )
    return [n for n in linear if not targets or any(n in found for found in ends.values())]
