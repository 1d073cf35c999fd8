"""Tiny models, tokenisers and SAEs: real architectures, random weights."""

from contextlib import contextmanager
from pathlib import Path

import torch
from sae_lens import (
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

WIDTH, LAYERS, VOCABULARY, FEATURES = 32, 4, 300, 96
FAMILIES = ("gemma2", "gemma3", "llama")
ARCHITECTURES = ("standard", "jumprelu", "gated", "topk")

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}


def config(family: str, **changes):
    """A tiny configuration. Gemma's windows are shorter than most sequences of the tests, and its
    soft-caps low enough to matter."""
    kind, own = {
        "gemma2": (
            Gemma2Config,
            {
                "sliding_window": 6,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 3.0,
                "query_pre_attn_scalar": 8,
            },
        ),
        "gemma3": (
            Gemma3TextConfig,
            {"sliding_window": 6, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
        ),
        "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    }[family]
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return kind(**(SIZES | own | ends | changes))


def network(family: str, seed: int = 0, dtype=torch.float32, **changes):
    """A random transformers model. Weights are drawn wider than usual, so that no distribution is
    nearly uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if "norm" in name else 0.15
            parameter.add_(spread * torch.randn_like(parameter))
    model.set_attn_implementation("eager")
    return model.to(dtype).eval()


@contextmanager
def plain(network):
    """Restore transformers' own attention in a network that fpo has used."""
    kernel = network.config._attn_implementation
    network.set_attn_implementation("eager")
    try:
        yield network
    finally:
        network.set_attn_implementation(kernel)


def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokeniser with a few merges, special tokens and no chat template."""
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    base.train_from_iterator(["the cat and the hat and the rat ", "code: x = y"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=base,
        bos_token="<bos>" if bos else None,
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=special[3:],
    )


def model_folder(path: Path, family: str = "gemma2", seed: int = 0, **changes) -> Path:
    """A model and its tokeniser on disk."""
    network(family, seed, **changes).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def sae(
    architecture: str = "jumprelu", width: int = WIDTH, features: int = FEATURES, seed=0, **changes
):
    """A random SAE of sae-lens."""
    kind, settings, extra = {
        "standard": (StandardSAE, StandardSAEConfig, {}),
        "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
        "gated": (GatedSAE, GatedSAEConfig, {}),
        "topk": (TopKSAE, TopKSAEConfig, {"k": 7}),
    }[architecture]
    made = kind(settings(d_in=width, d_sae=features, **(extra | changes)))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1))
            if name == "threshold":
                parameter.abs_().add_(0.2)
            if name in ("b_enc", "b_gate"):
                # A third of the features never fires, so that pooled vectors are sparse.
                parameter[::3] = -100
    return made


def sae_folder(path: Path, **kind) -> Path:
    """An SAE on disk, in sae-lens's layout."""
    sae(**kind).save_model(path)
    return path
