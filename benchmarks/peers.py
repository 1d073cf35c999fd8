"""TRL's trainers on the token ids of a store, so that both sides see the same tokens.

Shapes: B pairs of a batch.
"""

from typing import Any

import torch
from common import BATCH
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from fpocli.store.reader import Store

RUNS = ("prompt", "chosen", "rejected")


def rows_of(store: Store, order: list[int]) -> Dataset:
    """The pairs of a store in TRL's columns."""
    blocks = [store.tokens(block) for block in range(store.blocks)]
    rows = []
    for pair in order:
        block, row = divmod(pair, store.block_size)
        tokens = blocks[block]
        rows.append({f"{run}_ids": getattr(tokens.pair(row), run).tolist() for run in RUNS})
    return Dataset.from_list(rows)


def load(folder: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokeniser as TRL's users load them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder)


def settings(out: str, **changes: Any) -> dict[str, Any]:
    """The settings of both TRL trainers; fpo's runs have the same."""
    return {
        "output_dir": out,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 5e-7,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 10.0,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "num_train_epochs": 1,
        "dataloader_pin_memory": False,
        "max_length": None,
    } | changes


class InOrder:
    """A trainer that does not shuffle the pairs."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


class Dpo(InOrder, DPOTrainer):
    """TRL's DPO, with references precomputed, on token ids, in their order."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


class SimPo(InOrder, CPOTrainer):
    """TRL's SimPO on token ids, in their order."""

    def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:
        """Ids and labels of both sequences, as the original method makes them from text."""
        prompt, row = feature["prompt_ids"], {}
        for side in ("chosen", "rejected"):
            response = feature[f"{side}_ids"]
            row[f"{side}_input_ids"] = prompt + response
            row[f"{side}_attention_mask"] = [1] * len(prompt + response)
            row[f"{side}_labels"] = [-100] * len(prompt) + response
        return row | {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}


def dpo(folder: str, rows: Dataset, out: str, dtype: torch.dtype, **changes: Any) -> Dpo:
    """Length-normalised DPO; constructing it computes the references."""
    model, tokenizer = load(folder, dtype)
    config = DPOConfig(
        **settings(out, **changes), precompute_ref_log_probs=True, loss_type="sigmoid_norm"
    )
    return Dpo(model=model, args=config, train_dataset=rows, processing_class=tokenizer)


def reference_logps(trainer: Dpo, rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    """S of chosen and rejected, [B] each, by the function that TRL precomputes with."""
    batch = trainer.data_collator(rows)
    batch = {name: part.to(trainer.model.device) for name, part in batch.items()}
    return trainer.compute_ref_log_probs(trainer.model, batch)


def simpo(folder: str, rows: Dataset, out: str, dtype: torch.dtype) -> SimPo:
    """SimPO, which TRL keeps in its CPO trainer."""
    model, tokenizer = load(folder, dtype)
    config = CPOConfig(**settings(out), loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.5)
    # The trainer prepares texts; tokenize_row replaces the ids that it makes of them.
    rows = rows.map(lambda row: {"prompt": "a", "chosen": "b", "rejected": "c"})
    return SimPo(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
