"""features.npz: how far every SAE feature moved from the reference, response by response.

A change is policy minus reference, both as the store has them: a value that is not among the K
largest, nor kept for every response, counts as 0. Policy and reference are cut in the same way, so
that neither is favoured: of one that is cut and one that is not, the first seems to have fallen.

Shapes: P pairs of a packed sequence, N pairs of the split, K stored features, m features of a site.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array, vstack
from torch import Tensor

from fpocli.features.encoder import top_k
from fpocli.features.sparse import to_sparse
from fpocli.features.top_features import TopFeatures
from fpocli.system.errors import UserError
from fpocli.system.files import replaced


@dataclass(frozen=True)
class FeatureChanges:
    """The changes at one site.

    Args:
        change: float64 [2N, m], sparse; rows 2i and 2i + 1 are pair i's chosen and rejected.
        before: float64 [2, m], sum over the pairs of the reference's values.
    """

    change: csr_array
    before: np.ndarray

    def means(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Over the pairs: the change of chosen responses and that of rejected ones, and the
        reference's value over both; [m] each."""
        n = self.change.shape[0] // 2
        chosen, rejected = (self.change[side::2].sum(0) / n for side in (0, 1))
        return chosen, rejected, self.before.mean(0) / n


def changes_of(
    pooled: Tensor, reference: TopFeatures[Tensor], dtype: torch.dtype = torch.float32
) -> FeatureChanges:
    """The changes of P pairs.

    Args:
        pooled: float32 [P, 2, m], the policy's.
        reference: the store's values of the same pairs.
        dtype: that of values in the store.
    """
    m = pooled.shape[-1]
    index, value = top_k(pooled, reference.value.shape[-1])
    policy = TopFeatures(
        index,
        value.to(dtype).float(),
        (pooled > 0).sum(-1),
        pooled[..., reference.kept].to(dtype).float(),
        reference.kept,
    )
    after, before = (
        to_sparse(TopFeatures(**{n: t.cpu().numpy() for n, t in vars(one).items()}), m)
        for one in (policy, reference)
    )
    change = csr_array(after - before)
    change.eliminate_zeros()
    return FeatureChanges(change, np.stack([before[::2].sum(0), before[1::2].sum(0)]))


def join(parts: list[FeatureChanges], order: np.ndarray) -> FeatureChanges:
    """The changes of all parts together.

    Args:
        parts: of all ranks.
        order: [N], the pairs of the parts, one after the other, in the store's order.
    """
    rows = np.column_stack([2 * order, 2 * order + 1]).ravel()
    return FeatureChanges(
        csr_array(vstack([part.change for part in parts], format="csr"))[rows],
        np.sum([part.before for part in parts], axis=0),
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
            f"{site}.before": found.before,
        }
    with replaced(file) as partial, partial.open("wb") as stream:
        np.savez_compressed(stream, **arrays)


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
                names = ("data", "indices", "indptr", "before")
                data, indices, indptr, before = (arrays[f"{site}.{name}"] for name in names)
                shape = (2 * len(pairs), before.shape[1])
                change = csr_array((data, indices, indptr), shape=shape)
                change.check_format(full_check=True)
                sites[site] = FeatureChanges(change, before)
            return pairs, sites
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist", "measure the run with `fpo eval`") from error
    except Exception as error:  # whatever a damaged archive raises
        raise UserError(f"{file} is damaged: {error}", "measure again with `fpo eval`") from error
