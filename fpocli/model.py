"""The language model: packed rows in, per-token log-probabilities and site states out.

Shapes: R rows, L slots per row, M scored tokens, d model width, V vocabulary.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fpocli.batches import Batch
from fpocli.catalog import ModelFolder
from fpocli.errors import UserError

# Logits of one chunk in float32 stay under this many bytes.
_CHUNK_BYTES = 128 * 2**20


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
        network: transformers' model with its head.
        sites: where hidden states are taken.

    Raises:
        UserError: a layer is out of range.
    """

    def __init__(self, network: Any, sites: list[Site]) -> None:
        super().__init__()
        self.network = network
        self.config = network.config.get_text_config()
        self.sites = sites
        check_layers(self.config, sites)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Score a batch.

        Returns:
            log-probability of each target, float32 [M] in nats;
            for every site the hidden states that predict the targets, [M, d].
        """
        final, states = self.states(batch)
        return self.logprobs(final, batch.targets), states

    def states(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the decoder; no logits yet.

        Returns:
            what the head reads at each predictor, [M, d], and the sites' states there, [M, d].
        """
        with self._capture() as captured:
            final = self.network.get_decoder()(
                input_ids=batch.ids,
                position_ids=batch.positions,
                attention_mask=self._masks(batch),
                use_cache=False,
            ).last_hidden_state
        return _at(final, batch.predictors), {
            name: _at(state, batch.predictors) for name, state in captured.items()
        }

    def logprobs(self, final: Tensor, targets: Tensor) -> Tensor:
        """log pi(target) of every predictor, chunk by chunk, recomputed in the backward pass.

        Args:
            final: [M, d] what the head reads.
            targets: [M] token ids.

        Returns:
            float32 [M], nats.
        """

        def chunk(states: Tensor, tokens: Tensor) -> Tensor:
            logits = self.logits(states)
            picked = logits.gather(-1, tokens[:, None]).squeeze(-1)
            return picked - logits.logsumexp(-1)

        size = self.chunk_size
        return torch.cat(
            [
                checkpoint(chunk, states, tokens, use_reentrant=False)
                if torch.is_grad_enabled()
                else chunk(states, tokens)
                for states, tokens in zip(final.split(size), targets.split(size), strict=True)
            ]
        )

    def logits(self, final: Tensor) -> Tensor:
        """The head with the final soft-cap: [M, d] -> float32 [M, V]. Chunks only, it is large."""
        # The head is called as a module, so that ZeRO-3's hooks gather its weight, and gather it
        # again when a checkpointed chunk is recomputed.
        logits = self.network.get_output_embeddings()(final).float()
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def chunk_size(self) -> int:
        """Predictors per chunk of the head."""
        return max(1, _CHUNK_BYTES // (4 * self.config.vocab_size))

    def _masks(self, batch: Batch) -> Any:
        """The attention rule in the form transformers takes: one 4-D additive mask, or one for
        every kind of layer."""
        masks = {
            kind: self._additive(
                batch, self.config.sliding_window if kind == "sliding_attention" else None
            )
            for kind in layer_kinds(self.config)
        }
        return masks if hasattr(self.config, "layer_types") else masks.popitem()[1]

    def _additive(self, batch: Batch, window: int | None) -> Tensor:
        dtype = self.network.dtype
        hidden = torch.zeros(1, dtype=dtype, device=batch.ids.device)
        return hidden.masked_fill(~batch.attends(window), torch.finfo(dtype).min).unsqueeze(1)

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


def _at(states: Tensor, slots: Tensor) -> Tensor:
    return states.flatten(0, 1).index_select(0, slots)


def read_config(folder: ModelFolder) -> Any:
    """transformers' configuration of a text model.

    Raises:
        UserError: transformers does not know the model's type.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder.path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the configuration of {folder.source} cannot be read: {error}") from error
    return config.get_text_config()


def check_layers(config: Any, sites: list[Site]) -> None:
    """Refuse a site whose layer the model does not have."""
    for site in sites:
        if not 0 <= site.layer < config.num_hidden_layers:
            raise UserError(
                f"layer {site.layer} is out of range: the model has layers 0 to "
                f"{config.num_hidden_layers - 1}",
                "give another --layer",
            )


def layer_kinds(config: Any) -> set[str]:
    """The kinds of attention layers of a model: full_attention, sliding_attention."""
    window = getattr(config, "sliding_window", None)
    only = "sliding_attention" if window else "full_attention"
    return set(getattr(config, "layer_types", None) or [only])


def attention_kernel(config: Any) -> str:
    """The kernel that applies a dense mask, and attention soft-capping where the model has it.

    sdpa drops soft-capping, so models that use it run with transformers' eager kernel.
    """
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


def check_kernel(network: Any) -> None:
    """Refuse what would silently drop the model's soft-capping or the rule of packed rows."""
    config = network.config.get_text_config()
    if other := layer_kinds(config) - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{type(network).__name__} has layers of the kind {', '.join(sorted(other))}, which "
            "cannot follow the attention rule of packed rows",
            "Gemma-2, Gemma-3 and Llama models are supported",
        )
    kernel = config._attn_implementation
    capped = getattr(config, "attn_logit_softcapping", None)
    if kernel not in (("eager",) if capped else ("eager", "sdpa")):
        raise UserError(
            f"the attention kernel {kernel} would drop the model's soft-capping or the attention "
            "rule of packed rows",
            "let fpo choose the kernel",
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
    """
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    check_layers(config, sites)
    network: Any
    try:
        network = AutoModelForCausalLM.from_pretrained(
            folder.path,
            dtype=dtype,
            attn_implementation=attention_kernel(config),
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the model {folder.source} cannot be loaded: {error}") from error
    check_kernel(network)
    return LanguageModel(network.to(device), sites)


def choose_device(name: str | None) -> torch.device:
    """The device of a name; None is the GPU where there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {name} cannot be used: {error}", "try --device cpu") from error
    return device
