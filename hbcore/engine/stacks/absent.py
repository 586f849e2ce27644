"""What a matrix rule finds in place of a part of the context that it did not declare."""

from __future__ import annotations

from typing import Any, NoReturn

from torch.utils._pytree import tree_leaves

from hbcore.errors import RuleError
from hbcore.rules.contract import title
from hbcore.rules.transform import Transform

OPERATORS = (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow",
    "matmul", "rmatmul", "and", "rand", "or", "ror", "xor", "rxor", "neg", "pos", "abs", "invert", "lt", "le", "gt", "ge",
    "bool", "float", "int", "len", "iter", "getitem", "setitem",
)  # fmt: skip
"""Python looks these up in the class, not in the instance."""


class Absent:
    """Stands in for a part of the context that the rule did not declare; any use of it is an error that says so.

    Args:
        rule: the rule.
        part: ``"param"``, ``"grad"``, ``"hvp"`` or ``"vector"``.
        method: the method that is given it; ``refresh`` has neither parameter nor gradient, whatever the rule declares.
    """

    def __init__(self, rule: Transform, part: str, method: str = "update") -> None:
        self._rule, self._part, self._method = rule, part, method

    def refuse(self) -> NoReturn:
        """Raise the error."""
        if self._method != "update" and self._part in ("param", "grad"):
            raise RuleError(
                f"{title(self._rule, self._method)} reads c.{self._part}, which only update can; keep what it needs in a slot."
            )
        needed = "hvp" if self._part == "vector" else self._part
        declared = ", ".join(map(repr, sorted({*self._rule.needs, needed})))
        raise RuleError(f"{title(self._rule, self._method)} reads c.{self._part}; declare needs = frozenset({{{declared}}}).")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself looks for, such as __array__, may be lacking
            raise AttributeError(name)
        self.refuse()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        next(value for value in tree_leaves((args, kwargs or {})) if isinstance(value, cls)).refuse()


def _refused(self: Absent, *_: Any) -> NoReturn:
    self.refuse()


for _operator in OPERATORS:
    setattr(Absent, f"__{_operator}__", _refused)
