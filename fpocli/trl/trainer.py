"""TRL's DPO trainer on the pairs of a store, with the feature constraint inside its loss.

TRL takes its sequences padded: the chosen ones of a batch, then the rejected ones. Shapes: P pairs
of a batch, L tokens of its longest sequence, M scored tokens, d model width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from fpocli.model.hook_point import captured_outputs
from fpocli.model.language_model import ModelOutput
from fpocli.system.errors import UserError
from fpocli.trl.constraint import FeatureConstraint

_TRL = "1.16"
_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
# TRL's losses that fpo has as well, and whether their rewards are per token. sft is TRL's term on
# the chosen responses, in which there is no reference.
_PER_TOKEN = {"sigmoid": False, "sigmoid_norm": True}


class FPOTrainer(DPOTrainer):
    """A DPOTrainer that reads what a store holds of the reference: it loads no reference model,
    scores nothing before training, and trains on the store's token ids as they are.

    With loss_type sigmoid_norm and a constraint it is fpo; with sigmoid, dpo+features.

    Args:
        model: as DPOTrainer takes it.
        args: TRL's settings; `precompute_ref_log_probs` is set.
        constraint: the feature constraint; None for DPO from the store.
        others: further arguments of DPOTrainer. Its data sets are those of `store_dataset`.

    Raises:
        UserError: a data set is not of a store, has sequences that TRL would truncate, or the
            settings and the constraint do not go together.
    """

    # For the model card that TRL writes.
    _tag_names = ["trl", "fpo"]  # noqa: RUF012
    _name = "FPO"
    _paper = {  # noqa: RUF012
        "title": "Constrain Alignment with Sparse Autoencoders",
        "id": "2411.07618",
        "citation": "",
    }

    def __init__(
        self,
        model: Any,
        *,
        args: DPOConfig,
        constraint: FeatureConstraint | None = None,
        **others: Any,
    ) -> None:
        _check_settings(args, constraint)
        args.precompute_ref_log_probs = True
        super().__init__(model=model, args=args, **others)
        self.data_collator = _WithPairs(self.data_collator)
        self.constraint = constraint
        if constraint:
            device = self.accelerator.device
            # accelerate numbers CPUs, and safetensors does not.
            constraint.load(
                self._network(), torch.device("cpu") if device.type == "cpu" else device
            )

    def _network(self) -> Any:
        network = self.accelerator.unwrap_model(self.model)
        # Of PEFT's models.
        return network.get_base_model() if hasattr(network, "get_base_model") else network

    # -- the data, which are prepared already ------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str
    ) -> Dataset:
        if not isinstance(dataset, Dataset) or not {*_COLUMNS, "pair"} <= {*dataset.column_names}:
            raise UserError(
                f"the {dataset_name} data set is not one of a store",
                "make it with fpocli.trl.store_dataset; parts of it, shuffled or not, are fine",
            )
        longest = _longest(dataset)
        if args.max_length is not None and longest > args.max_length:
            raise UserError(
                f"max_length is {args.max_length}, and the store has sequences of {longest} tokens,"
                " which would be truncated while the reference's values are of all tokens",
                f"set max_length={longest} or None; fpo cache --max-length has truncated already",
            )
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        # By default the arguments of the model, to which other columns would be lost.
        self._signature_columns = [*_COLUMNS, "pair"]  # type: ignore[assignment]

    # -- the loss ----------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs = dict(inputs)
        pairs = inputs.pop("pair")
        if self.constraint is None:
            return super()._compute_loss(model, inputs, return_outputs)
        with self._constrained(self.constraint, model, inputs, pairs.tolist()) as measured:
            result = super()._compute_loss(model, inputs, return_outputs)
        self._log(measured, "train" if model.training else "eval")
        return result

    @contextmanager
    def _constrained(
        self, constraint: FeatureConstraint, model: Any, inputs: dict[str, Any], pairs: list[int]
    ) -> Iterator[dict[str, Tensor]]:
        """Subtract delta from the argument of the sigmoid, and collect what is logged of it.

        The argument is beta (X_w - X_l) with X = S - S_ref, or X = (S - S_ref) / n. TRL reads S_ref
        of the batch after the model has run. Meanwhile S_ref of the rejected responses is lowered,
        and so X_l raised, by delta / beta, or n delta / beta, with its gradient.
        """
        measured: dict[str, Tensor] = {}
        mask = inputs["completion_mask"][:, 1:].bool()
        # By pair: chosen and rejected of the first one, then of the next.
        order = torch.arange(len(mask), device=mask.device).view(2, -1).T.flatten()
        counts = mask[order].sum(1).tolist()
        per_token = any(_PER_TOKEN.get(name) for name in self.loss_types)

        def scored(values: Tensor) -> Tensor:
            """What [2P, L - 1, ...] holds of the scored tokens: [M, ...]."""
            # Of virtual tokens of prompt tuning, which come first, nothing is scored.
            values = values[:, -mask.shape[1] :]
            return torch.cat([values[row][mask[row]] for row in order.tolist()])

        def add(module: Any, arguments: Any, output: Any) -> None:
            handle.remove()
            if any(not s.requires_grad for s in captured.values()) and torch.is_grad_enabled():
                raise UserError(
                    "the hidden states of the constraint have no gradient",
                    "with reentrant checkpointing they have none: set gradient_checkpointing_kwargs"
                    '={"use_reentrant": False}',
                )
            with torch.autocast(mask.device.type, enabled=False):
                states = {site: scored(state[:, :-1]) for site, state in captured.items()}
                policy = ModelOutput(scored(output.log_probs.float()), states)
                found = constraint.compare(policy, counts, pairs, self.beta)
            kept = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]], 1)
            if not torch.equal(kept, found.ref_logp):
                raise UserError(
                    "the batch's reference values are not those of the constraint's store "
                    f"{constraint.store.path}",
                    "make data set and constraint from the same store",
                )
            lengths = torch.tensor(counts[1::2], device=mask.device) if per_token else 1
            lowered = inputs["ref_rejected_logps"] - lengths * found.delta / self.beta
            inputs["ref_rejected_logps"] = lowered
            chosen, rejected = (self.beta * (found.logp.detach() - kept)).unbind(1)
            measured.update(
                {
                    "delta": found.delta.detach(),
                    "distance/chosen": found.distance[:, 0].detach(),
                    "distance/rejected": found.distance[:, 1].detach(),
                    # As TRL has them without delta.
                    "rewards/rejected": rejected,
                    "rewards/margins": chosen - rejected,
                    "rewards/accuracies": (chosen > rejected).float(),
                }
            )

        with captured_outputs(self._network(), constraint.sites) as captured:
            handle = model.register_forward_hook(add)
            try:
                yield measured
            finally:
                handle.remove()

    def _log(self, measured: dict[str, Tensor], mode: str) -> None:
        metrics = self._metrics[mode]
        for name, values in measured.items():
            if name.startswith("rewards/"):
                # TRL's own, of the lowered S_ref.
                metrics[name].pop()
            metrics[name].append(self.accelerator.gather(values).mean().item())


class _WithPairs:
    """A collator that keeps the pairs' numbers beside the batch of another one."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self._collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self._collator(examples)
        batch["pair"] = torch.tensor([example["pair"] for example in examples])
        return batch


def _check_settings(args: DPOConfig, constraint: FeatureConstraint | None) -> None:
    if not trl.__version__.startswith(f"{_TRL}."):
        # Another one might not call what is overridden here, and train without the constraint.
        raise UserError(
            f"FPOTrainer is made for TRL {_TRL}, and this is {trl.__version__}",
            'install it with pip install "fpocli[trl]"',
        )
    if args.ld_alpha is not None:
        raise UserError(
            "with ld_alpha TRL weighs the tokens of the reference's log-probabilities, of which "
            "the store has the sums",
            "leave it out",
        )
    if constraint is None:
        return
    losses = [name for name in args.loss_type if name != "sft"]
    if len(losses) != 1 or losses[0] not in _PER_TOKEN:
        raise UserError(
            f"the constraint is not defined for the loss_type {', '.join(args.loss_type)}",
            "use sigmoid_norm (fpo) or sigmoid (dpo+features), alone or beside sft",
        )
    if args.f_divergence_type != "reverse_kl":
        raise UserError(
            f"the constraint is not defined for the f_divergence_type {args.f_divergence_type}",
            "leave it out",
        )
    if not args.beta > 0:
        raise UserError(f"the constraint is scaled by beta, and beta is {args.beta}", "set one")


def _longest(dataset: Dataset) -> int:
    """Tokens of the longest sequence, prompt and response."""
    import pyarrow.compute as compute

    longest = 0
    for batch in dataset.with_format("arrow").iter(10_000):
        prompt, *responses = (compute.list_value_length(batch[name]) for name in _COLUMNS[:3])
        ends = (compute.max(compute.add(prompt, response)).as_py() for response in responses)
        longest = max(longest, *ends)
    return longest
