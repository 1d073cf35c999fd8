"""Compared with TRL on the same token ids: references it precomputes, losses, steps with LoRA."""

import json

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from runs import run
from safetensors.torch import load_file
from stores import cache_config
from trl import DPOConfig, DPOTrainer

from fpocli import cache
from fpocli.config import TrainConfig
from fpocli.data.pairs import TokenPair
from fpocli.model.adapter import LoRA
from fpocli.model.language_model import LanguageModel
from fpocli.model.packing import pack
from fpocli.scoring.score import score
from fpocli.store.records import ReferenceValues
from fpocli.system.model_folder import find_model
from fpocli.training.objective import objective

BETA = 0.3

# TRL still uses names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")


def trainer(material, tmp_path, loss_type: str) -> DPOTrainer:
    rows = [json.loads(line) for line in (material / "pairs.jsonl").read_text().splitlines()[:6]]
    return DPOTrainer(
        model=tiny.network("llama", seed=1),
        ref_model=tiny.network("llama", seed=0),
        args=DPOConfig(
            output_dir=str(tmp_path),
            precompute_ref_log_probs=True,
            per_device_train_batch_size=6,
            loss_type=loss_type,
            beta=BETA,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            report_to="none",
            max_length=None,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
    )


@pytest.fixture(params=["sigmoid", "sigmoid_norm"])
def peer(request, material, tmp_path):
    return request.param, trainer(material, tmp_path, request.param)


def test_references_and_losses_agree(peer):
    loss_type, theirs = peer
    rows = list(theirs.train_dataset)
    batch = pack(
        [
            TokenPair(*(np.array(row[f"{run}_ids"]) for run in ("prompt", "chosen", "rejected")))
            for row in rows
        ]
    )
    with torch.no_grad():
        own = score(LanguageModel(tiny.network("llama", seed=0), []), {}, batch)
    expected = torch.tensor([[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in rows])
    assert torch.allclose(own.logp, expected, atol=1e-4)

    inputs = theirs.data_collator([dict(row) for row in rows])
    their_loss = theirs.compute_loss(theirs.model, inputs)
    weight = theirs.model.model.layers[0].mlp.up_proj.weight
    (their_gradient,) = torch.autograd.grad(their_loss, weight)

    policy = LanguageModel(theirs.model, [])
    reference = ReferenceValues(own.logp, own.average[:, 0] - own.average[:, 1], {})
    method = {"sigmoid": "dpo", "sigmoid_norm": "fpo"}[loss_type]
    settings = TrainConfig(cache="unused", method=method, beta=BETA, alpha=0)
    loss, _ = objective(score(policy, {}, batch), reference, {}, settings)
    assert loss.mean().item() == pytest.approx(their_loss.item(), abs=1e-5)
    (own_gradient,) = torch.autograd.grad(loss.mean(), weight)
    assert torch.allclose(own_gradient, their_gradient, atol=1e-6)
    assert their_gradient.abs().max() > 1e-5


@pytest.mark.parametrize("loss_type", ["simpo", "sft"])
def test_simpo_and_sft_agree_with_trls(material, tmp_path, loss_type):
    """Its CPO trainer has SimPO's loss, its SFT trainer the mean of -log pi over all tokens: with
    responses of one length, our mean of -a(w)."""
    from trl import SFTConfig, SFTTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    rng = np.random.default_rng(0)
    runs = [[rng.integers(5, tiny.VOCABULARY, n) for n in (4, 7, 7)] for _ in range(5)]
    pairs = [TokenPair(*run) for run in runs]
    common = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 5, "use_cpu": True,
        "bf16": False, "report_to": "none", "max_length": None, "dataloader_pin_memory": False,
    }  # fmt: skip
    network = tiny.network("llama", seed=1)
    if loss_type == "simpo":
        settings = CPOConfig(**common, loss_type="simpo", cpo_alpha=0.0, beta=BETA, simpo_gamma=0.4)
        theirs = CPOTrainer(
            model=network,
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=tiny.tokenizer(),
        )
        rows = [cpo_row(pair) for pair in pairs]
        their_loss = theirs.compute_loss(network, theirs.data_collator(rows))
        # TRL takes gamma inside beta: beta (a_w - a_l - gamma / beta).
        own = TrainConfig(cache="unused", method="simpo", beta=BETA, gamma=0.4)
    else:
        rows = [
            {
                "input_ids": [*pair.prompt.tolist(), *pair.chosen.tolist()],
                "completion_mask": [0] * 4 + [1] * 7,
            }
            for pair in pairs
        ]
        theirs = SFTTrainer(
            model=network,
            args=SFTConfig(**common, completion_only_loss=True),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny.tokenizer(),
        )
        inputs = theirs.data_collator([dict(row) for row in theirs.train_dataset])
        their_loss = theirs.compute_loss(network, inputs)
        own = TrainConfig(cache="unused", method="sft")
    weight = network.model.layers[0].mlp.up_proj.weight
    (their_gradient,) = torch.autograd.grad(their_loss, weight)
    nothing = ReferenceValues(torch.zeros(5, 2), torch.zeros(5), {})
    scores = score(LanguageModel(network, []), {}, pack(pairs))
    loss, _ = objective(scores, nothing, {}, own)
    (own_gradient,) = torch.autograd.grad(loss.mean(), weight)
    assert loss.mean().item() == pytest.approx(their_loss.item(), abs=1e-5)
    assert torch.allclose(own_gradient, their_gradient, atol=1e-6)
    assert their_gradient.abs().max() > 1e-5


def test_steps_with_lora_agree(material, tmp_path):
    """TRL's trainer with PEFT against fpo train: the matrices after three steps on all pairs."""
    model = tiny.model_folder(tmp_path / "model", "llama")
    changes = {"model": str(model), "layer": [], "sae": []}
    store = cache(cache_config(material, tmp_path / "ref.zarr", **changes))
    out = tmp_path / "run"
    run(
        material, out, "--no-bf16", cache=store.path, method="dpo_norm", beta=BETA, lora_rank=3,
        lora_alpha=8, batch_size=21, epochs=3, lr=1e-2, eval_fraction=0,
    )  # fmt: skip
    pairs = [store.tokens(block).pair(n) for block in range(3) for n in range([8, 8, 5][block])]
    theirs = DPOTrainer(
        model=tiny.network("llama"),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"), per_device_train_batch_size=21, num_train_epochs=3,
            learning_rate=1e-2, lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=10.0,
            loss_type="sigmoid_norm", beta=BETA, use_cpu=True, bf16=False, report_to="none",
            max_length=None, dataloader_pin_memory=False, save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=3, lora_alpha=8, target_modules="all-linear"),
    )  # fmt: skip
    theirs.train_dataset = Dataset.from_list(
        [
            {
                f"{part}_ids": getattr(pair, part).tolist()
                for part in ("prompt", "chosen", "rejected")
            }
            for pair in pairs
        ]
    )
    # fpo's first matrices, which depend on its seed.
    start = tiny.network("llama")
    LoRA(start, find_model(str(model)), rank=3, alpha=8, targets=[], seed=0)
    named = {f"base_model.model.{name}": value for name, value in start.state_dict().items()}
    theirs.model.load_state_dict(named)
    theirs.train()
    expected = get_peft_model_state_dict(theirs.model)
    found = load_file(out / "adapter/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=2e-4), name
    moved = [value for name, value in found.items() if ".lora_B" in name]
    assert min(value.abs().max() for value in moved) > 0.01


def cpo_row(pair: TokenPair) -> dict:
    """The ids that TRL's CPO makes from a pair's texts."""
    prompt, row = pair.prompt.tolist(), {}
    for side in ("chosen", "rejected"):
        response = getattr(pair, side).tolist()
        row[f"{side}_input_ids"] = prompt + response
        row[f"{side}_attention_mask"] = [1] * (len(prompt) + len(response))
        row[f"{side}_labels"] = [-100] * len(prompt) + response
    return row | {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
