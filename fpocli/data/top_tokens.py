"""The n likeliest next tokens of the reference at scored positions: what a store holds of its
distributions. All other tokens are lumped into one, the rest.

Shapes: M scored positions, n tokens, V vocabulary.
"""

from typing import Any, Generic, NamedTuple, TypeVar

# A NumPy array, as in a store, or a tensor, as in training.
Array = TypeVar("Array")


class TopTokens(NamedTuple, Generic[Array]):
    """Next-token distributions at M positions. A tuple, so that DeepSpeed finds the tensors in it.

    Args:
        ids: [M, n], the likeliest tokens, by falling probability; None if n = V, and the columns
            of `logp` are then the vocabulary in order.
        logp: [M, n], their log-probabilities, nats.
        rest: [M], log-probability of all other tokens together, nats; -inf if there are none.
    """

    ids: Array | None
    logp: Array
    rest: Array

    def at(self, rows: Any) -> "TopTokens[Array]":
        """The distributions at some of the positions."""
        stored: Any = self
        parts: Any = [None if values is None else values[rows] for values in stored]
        return TopTokens(*parts)

    @property
    def arrays(self) -> dict[str, Array]:
        """The arrays that there are, by name."""
        return {name: part for name, part in self._asdict().items() if part is not None}
