"""The models that training holds: the policy, and the frozen reference where it is needed."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fpocli.config import TrainConfig
from fpocli.features.site import Site
from fpocli.model.adapter import LoRA, require_peft
from fpocli.model.four_bit import require_bitsandbytes
from fpocli.model.language_model import LanguageModel, WithoutAdapter, load_model
from fpocli.model.router import RouterLoss
from fpocli.scoring.loading import find_reference, load_reference, tokenizer_of
from fpocli.scoring.startup_check import check_against_transformers
from fpocli.store.reader import Store
from fpocli.system.console import say
from fpocli.system.model_folder import ModelFolder, find_model
from fpocli.system.ranks import Ranks
from fpocli.training.engine import partitioned, shard


class Models(NamedTuple):
    """What `load_models` returns.

    Args:
        policy: with its starting weights, and its adapter if one is trained.
        tokenizer: the policy's.
        reference: what maps a packed sequence to a ReferenceOutput; None if it is not needed.
        folder: of the starting weights.
    """

    policy: LanguageModel
    tokenizer: Any
    reference: Any
    folder: ModelFolder


def require_packages(settings: TrainConfig) -> None:
    """Refuse an adapter, or weights in 4 bits, without the package for it.

    Raises:
        UserError: it is not installed.
    """
    if settings.lora_rank:
        require_peft()
    if settings.load_in_4bit:
        require_bitsandbytes()


def load_models(
    store: Store,
    settings: TrainConfig,
    sites: list[Site],
    deepspeed: dict[str, Any],
    device: torch.device,
    *,
    revision: str | None,
    with_reference: bool,
) -> Models:
    """Load the policy, and the reference if it is needed: each complete on every rank, or
    partitioned under ZeRO-3.

    An adapter's reference is the policy with the adapter off, unless training starts from other
    weights.

    Args:
        store: the store.
        settings: of the run.
        sites: where hidden states are taken.
        deepspeed: DeepSpeed's configuration.
        device: where they run.
        revision: the hub's commit of --model; None is the newest.
        with_reference: whether the KL is computed without the store's distributions.

    Raises:
        UserError: a model is not found, not the one it should be, or cannot be loaded. All ranks
            raise.
    """
    ranks = Ranks.connected()
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    trust = settings.trust_remote_code

    def reference_folder() -> ModelFolder:
        return find_reference(store, settings.reference, trust_remote_code=trust)

    if settings.model:
        folder = find_model(settings.model, revision=revision, trust_remote_code=trust)
        folder = replace(folder, load_in_4bit=settings.load_in_4bit)
    else:
        folder = reference_folder()
    tokenizer = tokenizer_of(store, folder)
    # Under ZeRO-3 rank 0 alone sees what is wrong with the files.
    model = ranks.on_each(lambda: load_model(folder, sites, dtype, device, partitioned(deepspeed)))
    if settings.lora_rank:
        ranks.on_each(lambda: _add_adapter(model, folder, settings))
    if settings.router_aux_loss:
        model.router_loss = ranks.on_each(lambda: RouterLoss(model.network))
    if settings.activation_checkpointing:
        model.network.activation_checkpointing_enable()
    if not with_reference:
        return Models(model, tokenizer, None, folder)
    if model.adapter and not settings.model:
        return Models(model, tokenizer, WithoutAdapter(model), folder)
    original = reference_folder() if settings.model else folder
    reference = ranks.on_each(
        lambda: load_reference(original, [], dtype, device, partitioned(deepspeed))
    )
    model.require_vocabulary(reference.vocabulary)
    sharded = shard(reference, deepspeed) if settings.zero == 3 else reference
    if settings.model:
        check_against_transformers(reference, store.tokens(0))
    return Models(model, tokenizer, sharded, folder)


def _add_adapter(model: LanguageModel, folder: ModelFolder, settings: TrainConfig) -> None:
    assert settings.lora_rank and settings.lora_alpha
    model.adapter = LoRA(
        model.network,
        folder,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        targets=settings.lora_target,
        seed=settings.seed,
    )
    trained = sum(parameter.numel() for parameter in model.adapter.parameters())
    say(
        f"LoRA of rank {settings.lora_rank}: {trained:,} parameters are trained; {folder.source} "
        "is frozen" + (", its linear layers in 4 bits" if folder.load_in_4bit else "")
    )
