"""Before the first step: can the policy be compared with the store, and is it the reference?

Shapes: P pairs of a packed sequence.
"""

from typing import Any

import torch

from fpocli.config import MAY_DIFFER, TrainConfig
from fpocli.features.encoder import SparseEncoder
from fpocli.scoring.loading import check_k, sites_of
from fpocli.scoring.rounding import LARGEST_GAP, LARGEST_GAP_OF_DTYPES
from fpocli.scoring.score import score
from fpocli.store.reader import Store
from fpocli.system.console import say
from fpocli.system.errors import UserError
from fpocli.system.ranks import same_on_all_ranks
from fpocli.training.micro_batch import MicroBatch
from fpocli.training.objective import compare_features


def check_store_serves(store: Store, settings: TrainConfig) -> None:
    """Refuse a method that the store cannot serve.

    Raises:
        UserError: the store is incomplete, or lacks what the method needs.
    """
    store.require_complete()
    if settings.constraint != "features":
        return
    if not store.sites:
        raise UserError(
            f"{settings.method} compares features, and {store.path} has none",
            "cache again with --layer and another --out, or train without features, such as with "
            "--method dpo_norm",
        )
    check_k(store, sites_of(store, settings.at), settings.k)


def check_4bit(store: Store, settings: TrainConfig) -> None:
    """Refuse to start from the reference with weights that are rounded otherwise.

    Raises:
        UserError: one is in 4 bits, and the other is not.
    """
    if settings.model is None and store.in_4bit != settings.load_in_4bit:
        there, flag, here = (
            ("in 4 bits", "add --lora-rank and --load-in-4bit", "without")
            if store.in_4bit
            else ("with all bits of its weights", "leave out --load-in-4bit", "with")
        )
        raise UserError(
            f"the reference of {store.path} was run {there}, so the policy would not start from it",
            f"{flag}, cache again {here} --load-in-4bit, or name the starting weights with --model",
        )


def check_dtype_and_kernel(store: Store, dtype: str, kernel: str, allow: list[str]) -> None:
    """Refuse to compare scores of different dtypes or attention kernels.

    Args:
        store: the store.
        dtype, kernel: of the policy.
        allow: which of the two may differ.

    Raises:
        UserError: the other one differs.
    """
    # With --allow, later blocks may have been made with other ones than the first.
    there = {
        name: [store.meta["model"][stored], *store.meta.get("allowed", {}).get(stored, [])]
        for name, stored in MAY_DIFFER.items()
    }
    here = {"dtype": dtype}
    if not store.imported:
        here["kernel"] = kernel
    other = [name for name in here if there[name] != [here[name]] and name not in allow]
    if other:
        listed = "; ".join(
            f"{name} {' and '.join(there[name])} in the store, {here[name]} here" for name in other
        )
        again = "cache again on the same kind of device"
        if "dtype" in other:
            again = f"cache again with --dtype {dtype}"
            if store.meta["model"]["dtype"] in ("float32", "bfloat16"):
                flag = "--no-bf16" if dtype == "bfloat16" else "--bf16"
                again = f"train in the store's dtype with {flag}, {again}"
        raise UserError(
            f"the policy would not run as the reference of {store.path} did: {listed}",
            f"{again}, or add "
            + " ".join(f"--allow {name}" for name in other)
            + "; then u, D and the KL start at rounding error instead of 0",
        )


@torch.no_grad()
def check_policy_is_reference(
    policy: Any,
    encoders: dict[str, SparseEncoder],
    store: Store,
    sample: MicroBatch,
    settings: TrainConfig,
) -> None:
    """Score a sample with the starting weights. If they are the reference's, u and D must start at
    0; if not, report how far they are from it. All ranks must call this function.

    Args:
        policy: the engine around the policy.
        encoders: an SAE for each site that is compared.
        store: the store.
        sample: P pairs of this rank.
        settings: of the run.

    Raises:
        UserError: the policy should be the reference and is not.
    """
    policy.eval()
    scores = score(policy, encoders, sample.batch, top=sample.top)
    # Means over the sample's tokens: rounding adds up to more in a response of a few tokens.
    tokens = scores.count.sum()
    gap = (scores.logp - sample.reference.logp).abs().sum() / tokens
    share = torch.zeros_like(gap)
    _, distances = compare_features(scores, sample.reference, encoders, settings.k)
    for site, distance in distances.items():
        scale = sample.reference.features[site].value[..., : settings.k].square().mean(-1)
        share = torch.maximum(share, distance.sum() / scale.sum().clamp(min=1e-12))
    apart = torch.zeros_like(gap)
    if scores.kl_bound is not None:
        apart = scores.kl_bound.sum() / tokens
    found_here = torch.stack([gap, share, apart])
    torch.distributed.all_reduce(found_here, torch.distributed.ReduceOp.MAX)
    nats, part, kl = found_here.tolist()
    found = f"log-probabilities differ by {nats:.3g} nats per token"
    if encoders:
        found += f", features by {part:.3g} of their mean square"
    if sample.top:
        found += f", the KL is {kl:.3g} nats per token"
    if settings.model is not None:
        say(f"the starting weights are not the reference's: {found}")
        return
    most = LARGEST_GAP["bfloat16" if settings.bf16 else "float32"]
    if "dtype" in settings.allow:
        most = LARGEST_GAP_OF_DTYPES
    # Written so that nan fails the comparison.
    if not (nats <= most and part <= most and kl <= most):
        error = UserError(
            f"the policy should be the reference of {store.path} and is not: {found}",
            "the store's log-probabilities were imported; cache again without --reference-logps"
            if store.imported
            else "weights and SAEs are those of the store, so this machine or a library computes "
            "differently from where the store was made; cache again on this machine",
        )
        raise same_on_all_ranks(error)
