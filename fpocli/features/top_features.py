"""The K largest pooled features of responses: what a store holds of a reference at a site.

Shapes: P pairs, K stored features, F features that are always stored, m features of the SAE.
Column 0 is chosen, column 1 rejected.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

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
