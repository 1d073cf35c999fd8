"""Stored features as a sparse matrix. Importing scipy's takes time, so it is not where a store is
opened.

Shapes: P pairs, m features of the SAE.
"""

import numpy as np
from scipy.sparse import csr_array

from fpocli.features.top_features import TopFeatures


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
