"""Before the first step: is the policy comparable with the store, and is it the reference?

Shapes: P pairs of a row.
"""

from typing import Any

import torch

from fpocli.config import MAY_DIFFER, TrainConfig
from fpocli.features.encoder import SparseEncoder
from fpocli.scoring.score import score
from fpocli.store.reader import Store
from fpocli.system.console import say
from fpocli.system.errors import UserError
from fpocli.system.ranks import same_on_all_ranks
from fpocli.training.objective import compare_features
from fpocli.training.stream import MicroBatch

# Largest difference of a, in nats per token, and of D, as a share of the features' mean square,
# that rounding explains. In bfloat16 the products of a GPU depend on the shapes of rows.
_FLOAT32, _BFLOAT16, _OTHER_DTYPE = 1e-3, 0.03, 0.3


def check_dtype_and_kernel(store: Store, dtype: str, kernel: str, allow: list[str]) -> None:
    """Refuse to compare numbers that were not made alike.

    Args:
        store: the store.
        dtype, kernel: of the model whose numbers are to be compared with it.
        allow: which of the two may differ.

    Raises:
        UserError: one that may not differ does.
    """
    # Some blocks may have been made otherwise than the first.
    there = {
        name: [store.meta["model"][stored], *store.meta.get("allowed", {}).get(stored, [])]
        for name, stored in MAY_DIFFER.items()
    }
    here = {"dtype": dtype, "kernel": kernel}
    other = [name for name in here if there[name] != [here[name]] and name not in allow]
    if other:
        told = "; ".join(
            f"the {name} was {' and '.join(there[name])}, it is {here[name]}" for name in other
        )
        raise UserError(
            f"the policy would not compute as the reference of {store.path} did: {told}",
            "cache again, or give "
            + " ".join(f"--allow {name}" for name in other)
            + ": then u, D and KL do not begin at 0 but at rounding",
        )


@torch.no_grad()
def check_start(
    policy: Any,
    encoders: dict[str, SparseEncoder],
    store: Store,
    sample: MicroBatch,
    settings: TrainConfig,
) -> None:
    """Score a sample with the starting weights. Where they are the reference's, u and D must begin
    at 0; where they are others, tell how far they are. All ranks must call it.

    Args:
        policy: an engine around it.
        encoders: an SAE for each site that is compared.
        store: the store.
        sample: this rank's rows of P pairs.
        settings: of the run.

    Raises:
        UserError: a policy that should be the reference is not.
    """
    policy.eval()
    scores = score(policy, encoders, sample.batch)
    gap = (scores.average - sample.reference.logp / scores.count).abs().max()
    share = torch.zeros_like(gap)
    _, distances = compare_features(scores, sample.reference, encoders, settings.k)
    for site, distance in distances.items():
        scale = sample.reference.features[site].value[..., : settings.k].square().mean(-1)
        share = torch.maximum(share, (distance / scale.clamp(min=1e-12)).max())
    both = torch.stack([gap, share])
    torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
    nats, part = both.tolist()
    told = f"log-probabilities differ by up to {nats:.3g} nats per token"
    if encoders:
        told += f", features by {part:.3g} of their mean square"
    if settings.model is not None:
        say(f"the starting weights are not the reference's: {told}")
        return
    most = _BFLOAT16 if settings.bf16 else _FLOAT32
    if "dtype" in settings.allow:
        most = _OTHER_DTYPE
    # Written so that nan is too large.
    if not (nats <= most and part <= most):
        error = UserError(
            f"the policy should be the reference of {store.path} and is not: {told}",
            "weights and SAE are the store's, so this machine or a library computes otherwise than "
            "where it was made; cache again here",
        )
        raise same_on_all_ranks(error)
