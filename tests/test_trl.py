"""Beside TRL: the references it precomputes and the losses it trains with, on the same ids."""

import json

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from fpocli.batches import pack
from fpocli.config import TrainConfig
from fpocli.model import LanguageModel
from fpocli.objective import ReferenceRows, objective
from fpocli.scoring import score
from fpocli.tokens import TokenPair

BETA = 0.3

# TRL still calls names that transformers has renamed.
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
    reference = ReferenceRows(own.logp, own.average[:, 0] - own.average[:, 1], {})
    method = {"sigmoid": "dpo", "sigmoid_norm": "fpo"}[loss_type]
    settings = TrainConfig(cache="unused", method=method, beta=BETA, alpha=0)
    loss, _ = objective(score(policy, {}, batch), reference, {}, settings)
    assert loss.mean().item() == pytest.approx(their_loss.item(), abs=1e-5)
    (own_gradient,) = torch.autograd.grad(loss.mean(), weight)
    assert torch.allclose(own_gradient, their_gradient, atol=1e-6)
    assert their_gradient.abs().max() > 1e-5
