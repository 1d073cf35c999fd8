"""The language model: a packed row in, per-token log-probabilities and site states out.

Shapes: L slots of the row, M scored tokens, d model width.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fpocli.model.attention import check_kernel, choose_kernel, layer_kinds, mask, register_kernels
from fpocli.model.head import choose_head, logprobs, logprobs_and_kl
from fpocli.model.packing import Batch
from fpocli.system.errors import UserError
from fpocli.system.model_folder import ModelFolder, refuse_code


@dataclass(frozen=True)
class Site:
    """Where a hidden state is taken.

    Args:
        layer: decoder layer, from 0.
        kind: resid_post, the layer's output before any final norm; or mlp_out, the MLP's
            contribution as it is added to the residual stream.
    """

    layer: int
    kind: str

    def __str__(self) -> str:
        return f"layer_{self.layer}.{self.kind}"

    @classmethod
    def parse(cls, name: str) -> "Site":
        """The site of a name such as layer_25.resid_post."""
        match = re.fullmatch(r"layer_(\d+)\.(resid_post|mlp_out)", name)
        if match is None:
            raise ValueError(f"{name} is not a site's name")
        return cls(int(match[1]), match[2])


class LanguageModel(nn.Module):
    """A causal language model that scores packed rows. The policy and the reference are both one.

    Args:
        network: transformers' model with its head, on its device; its attention kernel is changed
            to one that follows the rule of packed rows.
        sites: where hidden states are taken.

    Raises:
        UserError: a layer is out of range, or the model cannot follow the rule.
    """

    def __init__(self, network: Any, sites: list[Site]) -> None:
        super().__init__()
        self.network = network
        self.config = network.config.get_text_config()
        self.sites = sites
        check_layers(self.config, sites)
        register_kernels()
        network.set_attn_implementation(choose_kernel(network.device))
        check_kernel(network)

    def forward(
        self, batch: Batch, expected: "Expected | None" = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Score a batch.

        Args:
            batch: the row.
            expected: what the reference makes of it, where the KL to it is asked for.

        Returns:
            log-probability of each target, float32 [M] in nats;
            for every site the hidden states that predict the targets, [M, d];
            KL(reference || policy) of each predictor, float32 [M] in nats, or None.
        """
        final, states = self.states(batch)
        if expected is None:
            return logprobs(self.network, final, batch.targets), states, None
        logp, kl = logprobs_and_kl(
            self.network, final, batch.targets, expected.network, expected.final
        )
        return logp, states, kl

    def states(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the decoder; no logits yet.

        Returns:
            what the head reads at each predictor, [M, d], and the sites' states there, [M, d].
        """
        with self._capture() as captured:
            final = self.network.get_decoder()(**self._inputs(batch)).last_hidden_state
        return final[0].index_select(0, batch.predictors), {
            name: state[0].index_select(0, batch.predictors) for name, state in captured.items()
        }

    def own_logprobs(self, batch: Batch, count: int) -> Tensor:
        """What the model's own forward pass gives for the first targets: float32 [count], nats."""
        logits = self.network(**self._inputs(batch), logits_to_keep=batch.predictors[:count]).logits
        targets = batch.targets[:count, None]
        return logits[0].float().log_softmax(-1).gather(-1, targets)[:, 0]

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """A batch as transformers takes it."""
        kernel = self.config._attn_implementation
        masks = {
            kind: mask(
                batch,
                self.config.sliding_window if kind == "sliding_attention" else None,
                kernel,
                self.network.dtype,
            )
            for kind in layer_kinds(self.config)
        }
        return {
            "input_ids": batch.ids[None],
            "position_ids": batch.positions[None],
            # Models with layers of several kinds take a mask for each.
            "attention_mask": masks if hasattr(self.config, "layer_types") else masks.popitem()[1],
            "spans": batch.spans,
            "use_cache": False,
        }

    @property
    def kernels(self) -> str:
        """The attention kernel and the way of the head, for people."""
        return f"attention {self.config._attn_implementation}, head {choose_head(self.network)}"

    @contextmanager
    def _capture(self) -> Iterator[dict[str, Tensor]]:
        """Collect the sites' states during a forward pass."""
        captured: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                captured[name] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [self._module(site).register_forward_hook(keep(str(site))) for site in self.sites]
        try:
            yield captured
        finally:
            # Gone before the backward pass, whose recomputation would fire them again.
            for hook in hooks:
                hook.remove()

    def _module(self, site: Site) -> nn.Module:
        layer = self.network.get_decoder().layers[site.layer]
        if site.kind == "resid_post":
            return layer
        # Gemma-2 and 3 norm the MLP's output before they add it to the residual stream.
        return getattr(layer, "post_feedforward_layernorm", layer.mlp)


class Expected(NamedTuple):
    """What the frozen reference makes of a batch. A tuple, which DeepSpeed sees into.

    Args:
        network: transformers' model, whose head makes distributions of `final`, chunk by chunk.
        final: [M, d] what the head reads at each predictor.
        states: of its sites, [M, d] each.
    """

    network: Any
    final: Tensor
    states: dict[str, Tensor]


class FrozenReference(LanguageModel):
    """The reference beside the policy, for what needs its whole distribution."""

    def __init__(self, network: Any, sites: list[Site]) -> None:
        super().__init__(network.requires_grad_(False), sites)
        self.eval()

    @torch.no_grad()
    def forward(self, batch: Batch) -> Expected:  # type: ignore[override]
        """Run the decoder on a batch."""
        return Expected(self.network, *self.states(batch))


def read_config(folder: ModelFolder) -> Any:
    """transformers' configuration of a text model.

    Raises:
        UserError: transformers does not know the model's type, or it needs code that may not be
            run.
    """
    return _read_config(folder).get_text_config()


def _read_config(folder: ModelFolder) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder.path, trust_remote_code=folder.trust_remote_code)
    except Exception as error:  # transformers checks little before it computes with a value
        refuse_code(folder, error)
        raise UserError(f"the configuration of {folder.source} cannot be read: {error}") from error


def check_layers(config: Any, sites: list[Site]) -> None:
    """Refuse a site whose layer the model does not have."""
    for site in sites:
        if not 0 <= site.layer < config.num_hidden_layers:
            raise UserError(
                f"layer {site.layer} is out of range: the model has layers 0 to "
                f"{config.num_hidden_layers - 1}",
                "give another --layer",
            )


def load_model(
    folder: ModelFolder, sites: list[Site], dtype: torch.dtype, device: torch.device
) -> LanguageModel:
    """Load a causal language model.

    Args:
        folder: where its files are.
        sites: where hidden states are taken.
        dtype: of the weights and the computation.
        device: where it runs.

    Raises:
        UserError: it cannot be loaded whole, or has no such layer.
    """
    check_layers(read_config(folder), sites)
    return LanguageModel(load_network(folder, dtype).to(device), sites)


def load_network(folder: ModelFolder, dtype: torch.dtype) -> Any:
    """transformers' model of a folder, on the CPU, every parameter read from the folder's files.

    Args:
        folder: where its files are.
        dtype: of the weights.

    Raises:
        UserError: the configuration describes another model than the weights are, or the model
            needs code that may not be run.
    """
    from transformers import AutoModelForCausalLM

    config = _read_config(folder)
    loaded: Any
    try:
        _check_size(folder, config)
        loaded = AutoModelForCausalLM.from_pretrained(
            folder.path,
            dtype=dtype,
            use_safetensors=True,
            # transformers' own choice, or the configuration may name a kernel of the hub's.
            attn_implementation=None,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=folder.trust_remote_code,
        )
    except UserError:
        raise
    except Exception as error:  # as in _read_config
        refuse_code(folder, error)
        raise UserError(f"the model {folder.source} cannot be loaded: {error}") from error
    network, report = loaded
    # transformers fills these with random numbers.
    absent = sorted(report["missing_keys"])
    other = sorted(name for name, *_ in report["mismatched_keys"])
    for names, what in ((absent, "lack"), (other, "have another shape of")):
        if names:
            raise UserError(
                f"the weights of {folder.source} {what} {', '.join(names[:3])}"
                + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
                "the model was not saved whole, or its config.json is of another one",
            )
    return network


def _check_size(folder: ModelFolder, config: Any) -> None:
    """Refuse a configuration of far more parameters than the weights hold, before memory is taken.

    Less than twice as many: then some are missing, and `load_network` can name them.
    """
    from transformers import AutoModelForCausalLM

    held, tensors = 0, 0
    for file in folder.weight_files:
        with safe_open(file, "pt") as weights:
            names = weights.keys()
            held += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
            tensors += len(names)
    layers = config.get_text_config().num_hidden_layers
    # transformers makes objects for each layer, even without memory for its weights.
    larger = f"{layers:,} layers, and the weights {tensors:,} tensors" if layers > tensors else ""
    if not larger:
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=None,
                trust_remote_code=folder.trust_remote_code,
            )
        described = sum(parameter.numel() for parameter in shapes.parameters())
        if described > 2 * held:
            larger = f"{described:,} parameters, and the weights {held:,}"
    if larger:
        raise UserError(
            f"config.json of {folder.source} describes a larger model than is there: {larger}",
            "the files are of different models, or the weights are quantised; fetch them anew",
        )


def choose_device(name: str | None) -> torch.device:
    """The device of a name; None is the GPU where there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {name} cannot be used: {error}", "try --device cpu") from error
    return device
