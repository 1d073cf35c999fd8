"""Conditions on columns of numbers, such as "margin > -1 and chosen_tokens < 800".

The syntax is Python's, the parser is Python's own, and nothing is evaluated as code: only numbers,
names of columns, comparisons, + - * /, `and`, `or`, `not` and brackets are understood.
"""

import ast
import operator
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from fpocli.system.errors import UserError

_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip


class Condition:
    """A condition that was parsed.

    Args:
        text: the condition.
        names: of the columns that it may use.
        flag: where it is from, for messages.

    Raises:
        UserError: it is no condition, or uses something else.
    """

    def __init__(self, text: str, names: Collection[str], flag: str) -> None:
        self._text, self._flag = text, flag
        self._names = names
        try:
            with warnings.catch_warnings(action="ignore"):
                self._tree = ast.parse(text.strip(), mode="eval").body
            self._truth(self._tree, {name: np.zeros(1) for name in names})
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else str(error)
            raise self._wrong(f"cannot be parsed: {reason}") from error

    def __call__(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Where it holds: bool [N].

        Args:
            columns: numbers [N] by name. A comparison with NaN is false, with its negation true.
        """
        return self._truth(self._tree, columns)

    def _truth(self, node: ast.expr, columns: Mapping[str, np.ndarray]) -> Any:
        if isinstance(node, ast.BoolOp):
            parts = [self._truth(part, columns) for part in node.values]
            join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return join.reduce(parts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self._truth(node.operand, columns)
        if isinstance(node, ast.Compare):
            if any(type(kind) not in _COMPARISONS for kind in node.ops):
                raise self._wrong("has a comparison that is not one of < <= > >= == !=")
            terms = [self._number(part, columns) for part in (node.left, *node.comparators)]
            held = np.ones(len(next(iter(columns.values()))), bool)
            for kind, one, other in zip(node.ops, terms, terms[1:], strict=False):
                held &= _COMPARISONS[type(kind)](one, other)
            return held
        raise self._wrong(f"has {ast.unparse(node)!r} where a comparison is needed")

    def _number(self, node: ast.expr, columns: Mapping[str, np.ndarray]) -> Any:
        value = getattr(node, "value", None)
        # True is an int in Python.
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                return np.float64(value)
            except OverflowError as error:
                raise self._wrong("has a number that is too large") from error
        if isinstance(node, ast.Name):
            if node.id not in columns:
                raise self._wrong(f"has the unknown name {node.id}")
            return columns[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self._number(node.operand, columns)
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            one, other = self._number(node.left, columns), self._number(node.right, columns)
            with np.errstate(all="ignore"):
                return _ARITHMETIC[type(node.op)](one, other)
        raise self._wrong(f"has {ast.unparse(node)!r} where a number or a name is needed")

    def _wrong(self, what: str) -> UserError:
        return UserError(
            f"{self._flag} {self._text[:80]!r} {what}",
            f"compare {', '.join(self._names)} with numbers; and, or, not and brackets join "
            "comparisons",
        )
