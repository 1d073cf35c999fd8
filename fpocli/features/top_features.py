"""The K largest pooled features of responses: what a store holds of a reference at a site.

Shapes: P pairs, K stored features, F features that are always stored, m features of the SAE.
Column 0 is chosen, column 1 rejected.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from scipy.sparse import csr_array

# A NumPy array, as in a store, or a tensor, as in training.
Array = TypeVar("Array")


@dataclass(frozen=True)
class TopFeatures(Generic[Array]):
    """The K largest pooled features of P pairs at one site, and those that `--keep` names.

    Args:
        index: [P, 2, K], by falling value; unused slots hold the stored dtype's largest number.
        value: [P, 2, K]; 0 in unused slots.
        nonzero: [P, 2], how many of the m features are > 0.
        kept_value: [P, 2, F], the values of the features that are stored for every response.
        kept: [F], which these are, rising.
    """

    index: Array
    value: Array
    nonzero: Array
    kept_value: Array
    kept: Array


def to_sparse(features: TopFeatures[np.ndarray], m: int) -> csr_array:
    """The stored values of 2P responses, 0 where there is none: float64 [2P, m].

    Args:
        features: of P pairs; rows 2i and 2i + 1 of the result are pair i's chosen and rejected.
        m: features of the SAE.
    """
    k = features.index.shape[-1]
    index, value = (array.reshape(-1, k) for array in (features.index, features.value))
    # Unused slots have the value 0 and an index that no feature has. What is stored for every
    # response is taken from there.
    row, slot = np.nonzero((value > 0) & ~np.isin(index, features.kept))
    kept = features.kept_value.reshape(len(index), -1)
    kept_row, column = np.nonzero(kept > 0)
    values = np.concatenate([value[row, slot], kept[kept_row, column]]).astype(np.float64)
    rows = np.concatenate([row, kept_row])
    columns = np.concatenate([index[row, slot].astype(np.int64), features.kept[column]])
    return csr_array((values, (rows, columns)), (len(index), m))
