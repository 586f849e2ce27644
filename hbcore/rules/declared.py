"""What a rule's class declares, checked when the class or an optimizer is made: a slip would otherwise show in a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from hbcore.errors import RuleError
from hbcore.rules.domain import ORDER, Domain

METHODS = (
    "hypers", "slots", "joins", "scalars", "rate", "blocks", "working_dtype", "derive", "prime", "update", "update_stacks",
    "refresh", "swap",
)  # fmt: skip
"""The methods of the protocol. A dataclass field of such a name would replace one."""

ATTRIBUTES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda v: isinstance(v, str), "a short text"),
    "version": (lambda v: isinstance(v, int) and not isinstance(v, bool), "a whole number"),
    "domain": (lambda v: isinstance(v, Domain), f"one of {', '.join(f'Domain.{d.name}' for d in Domain)}"),
    "stage": (lambda v: isinstance(v, str) and v in ORDER, f"one of {', '.join(map(repr, ORDER))}"),
    "owns_apply": (lambda v: isinstance(v, bool), "True or False"),
    "primes": (lambda v: isinstance(v, bool), "True or False"),
    "staggers": (lambda v: isinstance(v, bool), "True or False"),
    "draws": (lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0, "a whole number, at least 0"),
    "needs": (lambda v: isinstance(v, (set, frozenset)) and v <= {"param", "grad"}, "a subset of {'param', 'grad'}"),
}
"""The class attributes of the protocol: whether a value is allowed, and which ones are."""


def check_class(cls: type[Any]) -> None:
    """Check the fields of a class derived from ``Transform``; its attributes are checked in a chain, :func:`check_instance`.

    Raises:
        RuleError: a field or a value is named like a method.
    """
    where = f"rule {cls.__module__}.{cls.__qualname__}"
    fields = {n for n, a in inspect.get_annotations(cls).items() if "ClassVar" not in str(a)}
    own = vars(cls)
    for name in METHODS:
        if name in fields or (name in own and not callable(own[name]) and not hasattr(own[name], "__get__")):
            raise RuleError(
                f"{where}: {name!r} is a method of every rule, and cannot be a field or a value; give the field another name."
            )


def check_attributes(where: str, values: dict[str, Any]) -> None:
    """Raise :class:`RuleError` unless every value is one that the attribute of its name may have."""
    for name, value in values.items():
        allowed, which = ATTRIBUTES[name]
        if not allowed(value):
            raise RuleError(f"{where}: {name} = {value!r} is not supported; {name} is {which}.")


def check_instance(where: str, rule: Any) -> None:
    """Check a rule as it stands in a chain, whose attributes may be properties or fields.

    Raises:
        RuleError: it has no name, its class is no dataclass of its own, or an attribute has a value that does not exist.
    """
    if "__dataclass_params__" not in vars(type(rule)):
        raise RuleError(f"{where} is not a dataclass; decorate the class with @dataclass(frozen=True).")
    check_attributes(where, {name: getattr(rule, name) for name in ATTRIBUTES})
    if not rule.name.strip():
        raise RuleError(f"{where} has no name; set the class attribute name to a short text that is unique in a chain.")
    _check_place(where, rule.owns_apply, rule.stage)


def check_branch(owner: str, branch: Any, rule: type[Any]) -> None:
    """Raise :class:`RuleError` unless ``branch`` is a sequence of instances of ``rule``, as the branches of ``owner`` are."""
    if not isinstance(branch, (tuple, list)):
        raise RuleError(f"a branch of {owner} is {kind(branch)}; pass a tuple of rules: (rule,).")
    if other := [v for v in branch if not isinstance(v, rule)]:
        raise RuleError(f"{kind(other[0])} is in a branch of {owner}; a branch is made of Transforms: (Rule(...),).")


def kind(value: Any) -> str:
    """What a value is, for messages: ``a list``, ``None``, ``the class X``, ``3 values``."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def lines_of(function: Any) -> str:
    """``file:line: `` of a function's definition; empty for what has none."""
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
    return "" if code is None else f"{code.co_filename}:{code.co_firstlineno}: "


def inner(value: Any) -> Iterator[Any]:
    """The members of nested tuples and lists, which hold a rule's inner rules among others."""
    for v in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(v, (tuple, list)):
            yield from inner(v)
        else:
            yield v


def _check_place(where: str, owns_apply: bool, stage: str) -> None:
    if owns_apply and stage != "apply":
        raise RuleError(
            f"{where}: a rule with owns_apply = True turns the step into the new parameter; at the stage {stage!r} it would be "
            "given, or leave to others, the wrong one of the two; set stage = 'apply'."
        )
