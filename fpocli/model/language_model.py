"""The language model: a packed sequence in, log-probabilities and hidden states at the sites out.

Shapes: L tokens of the packed sequence, M scored tokens, d model width.
"""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fpocli.data.top_tokens import TopTokens
from fpocli.features.site import Site
from fpocli.model.adapter import LoRA
from fpocli.model.attention import (
    attention_mask,
    check_attention,
    choose_kernel,
    layer_types,
    register_kernel,
)
from fpocli.model.four_bit import prepare
from fpocli.model.head import (
    CHUNKED,
    choose_head,
    logprobs,
    logprobs_and_bound,
    logprobs_and_kl,
    logprobs_and_top,
)
from fpocli.model.hook_point import captured_outputs
from fpocli.model.network import check_layers, load_network, read_config
from fpocli.model.packing import PackedSequence
from fpocli.model.router import RouterLoss
from fpocli.system.errors import UserError
from fpocli.system.model_folder import ModelFolder


class LanguageModel(nn.Module):
    """A causal language model that scores packed sequences: the policy, or the reference.

    Its attribute `adapter` is the LoRA adapter that is trained in it, or None; `router_loss` is the
    auxiliary loss of its routers if that is trained as well, or None.

    Args:
        network: transformers' model with its head, on its device. Its attention implementation is
            replaced by one that follows the attention rule of packed sequences.
        sites: where hidden states are taken.
        head: which head computes log-probabilities; None for that of `choose_head`.

    Raises:
        UserError: a layer is out of range, or the model cannot follow the rule.
    """

    def __init__(self, network: Any, sites: list[Site], head: str | None = None) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.adapter: LoRA | None = None
        self.router_loss: RouterLoss | None = None
        self.config = network.config.get_text_config()
        self.sites = sites
        check_layers(self.config, sites)
        register_kernel()
        network.set_attn_implementation(choose_kernel(network.device))
        check_attention(network)

    def forward(
        self,
        batch: PackedSequence,
        reference: "ReferenceOutput | None" = None,
        top: TopTokens[Tensor] | None = None,
        distributions: int = 0,
    ) -> "ModelOutput":
        """Score a packed sequence.

        Args:
            batch: the packed sequence.
            reference: what the reference makes of it, for the KL to it.
            top: what a store holds of the reference's distributions, for the KL's lower bound.
            distributions: of how many tokens this model's own distributions are returned.
        """
        routers = {"output_router_logits": True} if self.router_loss else {}
        final, states, decoded = self._decode(batch, **routers)
        head = self.network, final, batch.targets
        logp, kl, bound, own = None, None, None, None
        if reference is not None:
            logp, kl = logprobs_and_kl(*head, reference.network, reference.final)
        if top is not None:
            logp, bound = logprobs_and_bound(*head, top)
        if distributions:
            logp, own = logprobs_and_top(*head, distributions)
        if logp is None:
            logp = logprobs(*head, self.head)
        uneven = None
        if self.router_loss:
            uneven = self.router_loss(decoded.router_logits, batch.spans[-1, 3])
        return ModelOutput(logp, states, kl, bound, own, uneven)

    def states(self, batch: PackedSequence) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the decoder without the head.

        Returns:
            the head's input at each predicting position, [M, d], and the hidden states of each
            site there, [M, d].
        """
        final, states, _ = self._decode(batch)
        return final, states

    def _decode(
        self, batch: PackedSequence, **options: bool
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        """What `states` returns, and all that the decoder does with these options."""
        with captured_outputs(self.network, self.sites) as captured:
            decoded = self.network.get_decoder()(**self.inputs(batch), **options)
        final = decoded.last_hidden_state[0].index_select(0, batch.predictors)
        states = {
            name: state[0].index_select(0, batch.predictors) for name, state in captured.items()
        }
        return final, states, decoded

    def inputs(self, batch: PackedSequence) -> dict[str, Any]:
        """A packed sequence as the arguments of transformers' decoder."""
        kernel = self.config._attn_implementation
        masks = {
            kind: attention_mask(
                batch,
                self.config.sliding_window if kind == "sliding_attention" else None,
                kernel,
                self.network.dtype,
            )
            for kind in layer_types(self.config)
        }
        return {
            "input_ids": batch.ids[None],
            "position_ids": batch.positions[None],
            # Models with layers of several types take a mask for each.
            "attention_mask": masks if hasattr(self.config, "layer_types") else masks.popitem()[1],
            "spans": batch.spans,
            "use_cache": False,
        }

    @property
    def vocabulary(self) -> int:
        """V, rows of the head, also where ZeRO-3 has partitioned it."""
        return self.network.get_output_embeddings().out_features

    def require_vocabulary(self, tokens: int) -> None:
        """Refuse to compare next-token distributions over different vocabularies.

        Raises:
            UserError: the reference's has another size.
        """
        if self.vocabulary != tokens:
            raise UserError(
                f"the model's head has {self.vocabulary:,} tokens and the reference's {tokens:,}, "
                "so there is no KL between their distributions",
                "use weights with the reference's vocabulary, or a method without the KL",
            )

    def kernels(self, *, distributions: bool) -> str:
        """Which attention kernel and which head are in use, for messages. Where next-token
        distributions are looked at, the head is always chunked."""
        head = CHUNKED if distributions else self.head or choose_head(self.network)
        return f"attention {self.config._attn_implementation}, head {head}"


class ModelOutput(NamedTuple):
    """What a model makes of a packed sequence. A tuple, so that DeepSpeed finds the tensors in it.

    Args:
        logp: float32 [M], log-probability of each target, nats.
        states: for every site the hidden states that predict the targets, [M, d].
        kl: float32 [M], KL(reference || policy) at each predicting position, nats; or None.
        kl_bound: float32 [M], its lower bound by a store's distributions, nats; or None.
        top: the model's own distributions at these positions, or None.
        router_aux_loss: float32 scalar, the auxiliary loss of the routers over all tokens; or None.
    """

    logp: Tensor
    states: dict[str, Tensor]
    kl: Tensor | None = None
    kl_bound: Tensor | None = None
    top: TopTokens[Tensor] | None = None
    router_aux_loss: Tensor | None = None


class ReferenceOutput(NamedTuple):
    """What the frozen reference makes of a packed sequence. A tuple, so that DeepSpeed finds the
    tensors in it.

    Args:
        network: transformers' model, whose head turns `final` into distributions chunk by chunk.
        final: [M, d] the head's input at each predicting position.
        states: hidden states of its sites there, [M, d] each.
    """

    network: Any
    final: Tensor
    states: dict[str, Tensor]


class FrozenReference(LanguageModel):
    """The reference in memory alongside the policy, for what needs its whole distribution."""

    def __init__(self, network: Any, sites: list[Site]) -> None:
        super().__init__(network.requires_grad_(False), sites)
        self.eval()

    @torch.no_grad()
    def forward(self, batch: PackedSequence) -> ReferenceOutput:  # type: ignore[override]
        """Run the decoder on a packed sequence."""
        return ReferenceOutput(self.network, *self.states(batch))


class WithoutAdapter:
    """The policy with its adapter off: the frozen reference, without a second copy of its weights.

    Args:
        policy: with an adapter, which started from the reference.
    """

    def __init__(self, policy: LanguageModel) -> None:
        assert policy.adapter
        self._policy, self._adapter = policy, policy.adapter

    @torch.no_grad()
    def __call__(self, batch: PackedSequence) -> ReferenceOutput:
        """Run the decoder on a packed sequence."""
        with self._adapter.off():
            final, _ = self._policy.states(batch)
        # The head has no adapter.
        return ReferenceOutput(self._policy.network, final, {})


def load_model(
    folder: ModelFolder,
    sites: list[Site],
    dtype: torch.dtype,
    device: torch.device,
    partitioned: AbstractContextManager | None = None,
) -> LanguageModel:
    """Load a causal language model.

    Args:
        folder: where its files are.
        sites: where hidden states are taken.
        dtype: of the weights and the computation.
        device: where it runs.
        partitioned: as `load_network` takes it.

    Raises:
        UserError: its files are incomplete, it has no such layer, or cannot be run in 4 bits.
    """
    check_layers(read_config(folder), sites)
    network = load_network(folder, dtype, partitioned).to(device)
    if folder.load_in_4bit:
        prepare(network)
    return LanguageModel(network, sites)
