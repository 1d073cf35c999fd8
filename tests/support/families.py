"""Tiny random models of many families, and the table of docs/families.md made with them.

PYTHONPATH=tests/support python tests/support/families.py > docs/families.md
"""

import tiny
import torch
from packed import random_pairs
from transformers import AutoConfig, AutoModelForCausalLM

from fpocli.features.site import Site
from fpocli.model.language_model import LanguageModel
from fpocli.model.router import RouterLoss
from fpocli.scoring.startup_check import check_against_transformers
from fpocli.store.records import TokenPairs
from fpocli.system.errors import UserError

_WINDOW = {"sliding_window": 6}
# transformers' model type -> its configuration: tiny, with all its special features in use.
FAMILIES = {
    "cohere": {},
    "cohere2": _WINDOW,
    "deepseek_v3": {},
    "ernie4_5": {},
    "exaone4": {},
    "gemma": {},
    "gemma2": _WINDOW
    | {
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3": {
        "text_config": tiny.SIZES | _WINDOW | {"query_pre_attn_scalar": 8},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 28,
            "patch_size": 14,
        },
    },
    "gemma3_text": _WINDOW | {"query_pre_attn_scalar": 8},
    "gemma4_text": {},
    "glm4": {},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512, "n_inner": 48},
    "gpt_neox": {},
    "gpt_oss": _WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {},
    "llama": {},
    "llama4_text": {},
    "ministral": {},
    "mistral": _WINDOW,
    "mixtral": {"num_local_experts": 4},
    "mpt": {},
    "olmo2": {},
    "olmo3": _WINDOW,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_5_text": {},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}
_SIZES = tiny.SIZES | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

_PAGE = """# Model families

After reading this page you know which model families fpo scores as plain transformers does.

Whatever is written here, `fpo cache`, `fpo train` and `fpo eval` check the model itself before they
score anything, on the device in use: a pair is scored in a packed sequence by fpo's kernels, and
one sequence at a time by transformers' own eager attention and head
(`fpocli/scoring/startup_check.py`). Log-probabilities and the hidden states at the hook points must
agree within a tolerance that depends on the dtype, or the command stops:

| dtype | log-probability, mean difference | hidden states, mean relative difference |
|---|---|---|
{tolerances}

The table is made by `tests/scoring/test_startup_check.py` from tiny random models of each family
(transformers {version}, float32, on a CPU, sliding windows shorter than the sequences). "agrees"
means that the log-probabilities differ by less than 1e-5 nats per token. A hook point `mlp_out` is
also refused where the layer does not add the MLP's output to the residual stream as it is.
Real checkpoints of these families may differ from the tiny ones in their settings; the check at
the start sees those.

Of the families that agree, {routed} can be trained with the auxiliary loss of
their routers, `fpo train --router-aux-loss` ([method.md](method.md#the-losses)).

| transformers' `model_type` | `resid_post` | `mlp_out` |
|---|---|---|
{families}
"""


def network(family: str, dtype: torch.dtype = torch.float32, **changes):
    """A random model of a family. Weights are drawn wider than usual, so that no distribution is
    nearly uniform."""
    config = AutoConfig.for_model(family, **(_SIZES | FAMILIES[family] | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if "norm" in name else 0.15
            parameter.add_(spread * torch.randn_like(parameter))
    return model.to(dtype).eval()


def token_pairs(count: int = 2, seed: int = 0, most: int = 20) -> TokenPairs:
    """Random pairs as a block of a store."""
    from fpocli.model.packing import pack

    packed = pack(random_pairs(count, seed, most))
    rows = torch.arange(count).numpy()
    return TokenPairs(packed.ids.numpy(), packed.spans, rows)


def verdict(family: str, kind: str) -> str:
    """The result of the check for a family at a hook point."""
    try:
        model = LanguageModel(network(family), [Site(1, kind)])
        found = check_against_transformers(model, token_pairs())
    except UserError as error:
        return f"refused: {_why(str(error))}"
    return "agrees" if found.nats < 1e-5 and found.states < 1e-5 else f"differs by {found}"


def has_router_loss(family: str) -> bool:
    """Whether it can be trained with --router-aux-loss."""
    try:
        RouterLoss(network(family))
    except UserError:
        return False
    return True


def _why(message: str) -> str:
    """The reason without figures, which depend on the machine."""
    for words, reason in (
        ("has layers of type", message.partition("has layers of type ")[2].partition(",")[0]),
        ("does not compute what", "its log-probabilities differ"),
        ("does not follow the attention rule", "its attention does not follow the packed rule"),
        ("cannot run on packed", "it cannot run on packed sequences"),
        ("does not add the output", "the MLP's output is not added as it is"),
        ("have no module mlp", "no module `mlp`"),
    ):
        if words in message:
            return reason
    return message


def page() -> str:
    """docs/families.md."""
    import transformers

    from fpocli.scoring.startup_check import TOLERANCE

    tolerances = [
        f"| {str(dtype).removeprefix('torch.')} | {most.nats:g} nats per token | {most.states:g} |"
        for dtype, most in TOLERANCE.items()
    ]
    verdicts = {
        family: [verdict(family, kind) for kind in ("resid_post", "mlp_out")] for family in FAMILIES
    }
    rows = [f"| `{family}` | {residual} | {mlp} |" for family, (residual, mlp) in verdicts.items()]
    routed = [
        f"`{family}`"
        for family, (residual, _) in verdicts.items()
        if residual == "agrees" and has_router_loss(family)
    ]
    return _PAGE.format(
        tolerances="\n".join(tolerances),
        version=transformers.__version__,
        routed=" and ".join(routed),
        families="\n".join(rows),
    )


if __name__ == "__main__":
    print(page(), end="")
