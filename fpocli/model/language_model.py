"""The language model: a packed row in, per-token log-probabilities and site states out.

Shapes: L slots of the row, M scored tokens, d model width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fpocli.features.site import Site
from fpocli.model.attention import check_kernel, choose_kernel, layer_kinds, mask, register_kernels
from fpocli.model.head import choose_head, logprobs, logprobs_and_kl
from fpocli.model.network import load_network, read_config
from fpocli.model.packing import PackedSequence
from fpocli.system.errors import UserError
from fpocli.system.model_folder import ModelFolder


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
        self, batch: PackedSequence, expected: "ReferenceOutput | None" = None
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

    def states(self, batch: PackedSequence) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the decoder; no logits yet.

        Returns:
            what the head reads at each predictor, [M, d], and the sites' states there, [M, d].
        """
        with self._capture() as captured:
            final = self.network.get_decoder()(**self._inputs(batch)).last_hidden_state
        return final[0].index_select(0, batch.predictors), {
            name: state[0].index_select(0, batch.predictors) for name, state in captured.items()
        }

    def own_logprobs(self, batch: PackedSequence, count: int) -> Tensor:
        """What the model's own forward pass gives for the first targets: float32 [count], nats."""
        logits = self.network(**self._inputs(batch), logits_to_keep=batch.predictors[:count]).logits
        targets = batch.targets[:count, None]
        return logits[0].float().log_softmax(-1).gather(-1, targets)[:, 0]

    def _inputs(self, batch: PackedSequence) -> dict[str, Any]:
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


class ReferenceOutput(NamedTuple):
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
    def forward(self, batch: PackedSequence) -> ReferenceOutput:  # type: ignore[override]
        """Run the decoder on a batch."""
        return ReferenceOutput(self.network, *self.states(batch))


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
