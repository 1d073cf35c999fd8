"""features.npz: how far every SAE feature moved from the reference, response by response.

A change is policy minus reference. Where the store lacks the reference's value, it is the smallest
change that is possible, as in D (docs/method.md).

Shapes: P pairs of a packed sequence, N pairs of the split, m features of a site.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array, vstack
from torch import Tensor

from fpocli.features.top_features import TopFeatures
from fpocli.system.errors import UserError


@dataclass(frozen=True)
class FeatureChanges:
    """The changes at one site.

    Args:
        change: float32 [2N, m], sparse; rows 2i and 2i + 1 are pair i's chosen and rejected.
        policy: float64 [2, m], sum over the pairs of the policy's pooled features.
        frequency: int64 [2, m], number of responses in which the policy's feature is > 0.
    """

    change: csr_array
    policy: np.ndarray
    frequency: np.ndarray


def changes_of(pooled: Tensor, reference: TopFeatures[Tensor]) -> FeatureChanges:
    """The changes of P pairs.

    Args:
        pooled: float32 [P, 2, m], the policy's.
        reference: the store's values of the same pairs.
    """
    m = pooled.shape[-1]
    smallest = reference.value[..., -1:]
    floor = torch.where(reference.nonzero[..., None] <= reference.value.shape[-1], 0, smallest)
    before = torch.minimum(pooled, floor)
    # Unused slots hold an index beyond m; their value is written to a column that is cut off.
    before = torch.cat([before, before[..., :1]], -1)
    before.scatter_(-1, reference.index.clamp(max=m), reference.value)
    before = before[..., :m]
    kept = reference.kept.expand_as(reference.kept_value)
    before.scatter_(-1, kept, reference.kept_value)
    change = (pooled - before).flatten(0, 1).cpu().numpy()
    return FeatureChanges(
        csr_array(change),
        pooled.double().sum(0).cpu().numpy(),
        (pooled > 0).sum(0).cpu().numpy(),
    )


def join(parts: list[FeatureChanges], order: np.ndarray) -> FeatureChanges:
    """The changes of all parts together.

    Args:
        parts: of all ranks.
        order: [N], the pairs of the parts, one after the other, in the store's order.
    """
    rows = np.column_stack([2 * order, 2 * order + 1]).ravel()
    return FeatureChanges(
        csr_array(vstack([part.change for part in parts], format="csr"))[rows],
        np.sum([part.policy for part in parts], axis=0),
        np.sum([part.frequency for part in parts], axis=0),
    )


def write_changes(file: Path, pairs: np.ndarray, sites: dict[str, FeatureChanges]) -> None:
    """Write features.npz.

    Args:
        file: the file.
        pairs: int64 [N], their numbers in the store.
        sites: the changes at each site.
    """
    arrays: dict[str, Any] = {"pair": pairs, "site": np.array(list(sites), np.str_)}
    for site, found in sites.items():
        arrays |= {
            f"{site}.indptr": found.change.indptr,
            f"{site}.indices": found.change.indices,
            f"{site}.data": found.change.data,
            f"{site}.policy": found.policy,
            f"{site}.frequency": found.frequency,
        }
    partial = file.with_name(file.name + ".partial")
    with partial.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    partial.replace(file)


def read_changes(file: Path) -> tuple[np.ndarray, dict[str, FeatureChanges]]:
    """The pairs' numbers in the store, and the changes at each site, that `write_changes` wrote.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            pairs = arrays["pair"]
            sites = {}
            for site in arrays["site"].tolist():
                names = ("data", "indices", "indptr", "policy", "frequency")
                data, indices, indptr, policy, frequency = (arrays[f"{site}.{n}"] for n in names)
                shape = (2 * len(pairs), policy.shape[1])
                change = csr_array((data, indices, indptr), shape=shape)
                change.check_format(full_check=True)
                sites[site] = FeatureChanges(change, policy, frequency)
            return pairs, sites
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist", "measure the run with `fpo eval`") from error
    except Exception as error:  # whatever a damaged archive raises
        raise UserError(f"{file} is damaged: {error}", "measure again with `fpo eval`") from error
