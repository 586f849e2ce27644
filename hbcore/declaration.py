"""An optimizer class's annotated fields as its constructor: collected when the class is made, bound when it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hbcore.engine.shared_options import OPTIONS
from hbcore.errors import RuleError

SHARED_DOC = """
Arguments of every optimizer:
    params: parameters, named parameters or groups of them, as torch.optim takes them; any floating dtype and shape unless said
        otherwise.
    **options: the options that all optimizers share; `hbcore show NAME` lists them with their meaning.

Raises:
    HyperparameterError: a hyperparameter is outside its bounds, or a setting does not exist.
    OptionError: an option does not exist, or this optimizer does not support it.
    ParameterError: ``params`` is empty, holds a duplicate, or a tensor that the rule cannot update.
""".strip()
"""What the docstring of every optimizer ends with."""


class Declaration(NamedTuple):
    """What a class declares, its bases' declarations included.

    Attributes:
        fields: its own parameters and their defaults, in order. A shared option among them is the rule's own business, and
            stays keyword-only.
        annotations: their types.
        options: shared options whose default differs in this class.
        closed: the class writes ``__init__`` itself, which has these parameters and takes no declared ones.
    """

    fields: dict[str, Any]
    annotations: dict[str, Any]
    options: dict[str, Any]
    closed: bool = False


def inherited(cls: type[Any]) -> Declaration:
    """What the bases of ``cls`` declare, merged as a dataclass merges its bases' fields."""
    declared: list[Declaration] = [vars(base)["_declared"] for base in cls.__mro__[1:] if "_declared" in vars(base)]
    if declared[0].closed:
        return declared[0]
    merged = Declaration({}, {}, {})
    for base in reversed(declared):
        merged.fields.update(base.fields)
        merged.annotations.update(base.annotations)
        merged.options.update(base.options)
    return merged


def collect(cls: type[Any], base: Declaration) -> Declaration:
    """Read the annotated fields of ``cls``, and new defaults for its base's, and take them off the class.

    Raises:
        RuleError: a field has no default, or the base's constructor is written out and would not take it.
    """
    fields, annotations, options = dict(base.fields), dict(base.annotations), dict(base.options)
    found = {n: a for n, a in inspect.get_annotations(cls).items() if "ClassVar" not in str(a) and not n.startswith("_")}
    given = [*found, *(n for n in dict.fromkeys((*fields, *OPTIONS)) if n not in found and n in vars(cls))]
    if given and base.closed:
        raise RuleError(
            f"{cls.__name__}.{given[0]}: the base class writes __init__ itself, which takes no declared fields; "
            f"write {cls.__name__}.__init__ as well."
        )
    for name in given:
        if name not in vars(cls):
            raise RuleError(f"{cls.__name__}.{name} has no default; every hyperparameter needs one.")
        if name in found:
            annotations[name] = found[name]
        (fields if name in found or name in fields else options)[name] = vars(cls)[name]
        delattr(cls, name)  # a group's value is in its dict; an attribute would show the class's default for it
    return Declaration(fields, annotations, options, base.closed)


def constructor(cls: type[Any], declared: Declaration, construct: Callable[..., None]) -> Callable[..., None]:
    """The ``__init__`` of ``cls``: normalises its arguments and calls ``construct(self, params, fields, options)``."""
    names = tuple(name for name in declared.fields if name not in OPTIONS)

    def __init__(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) > len(names):
            raise TypeError(f"{cls.__name__}() takes params and {len(names)} more positional arguments, not {len(args)}.")
        given = dict(zip(names, args, strict=False))
        if twice := next((name for name in given if name in kwargs), None):
            raise TypeError(f"{cls.__name__}() got multiple values for argument {twice!r}.")
        given.update({name: kwargs.pop(name) for name in declared.fields if name in kwargs})
        construct(self, params, self.normalise({**declared.fields, **given}), {**declared.options, **kwargs})
        self.after_init()

    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    __init__.__signature__ = signature(declared, with_self=True)  # type: ignore[attr-defined]
    return __init__


def signature(declared: Declaration, with_self: bool = False) -> inspect.Signature:
    """Every parameter of a declared class: ``params``, its fields, and the shared options as keywords."""
    kind = inspect.Parameter
    own = [
        kind(name, kind.POSITIONAL_OR_KEYWORD, default=default, annotation=declared.annotations.get(name, kind.empty))
        for name, default in declared.fields.items()
        if name not in OPTIONS
    ]
    first = [kind(name, kind.POSITIONAL_OR_KEYWORD) for name in (["self", "params"] if with_self else ["params"])]
    defaults = {**declared.options, **{n: d for n, d in declared.fields.items() if n in OPTIONS}}
    return inspect.Signature([*first, *own, *shared_parameters(defaults, set())])


def written_out(cls: type[Any], defaults: Mapping[str, Any]) -> tuple[Declaration, inspect.Signature]:
    """The parameters of a class that writes ``__init__`` itself, and its signature with the shared options spelled out."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    own = {p.name: p.default for p in named if p.name != "params"}
    return Declaration(own, {}, {}, closed=True), inspect.Signature([*named, *shared_parameters(defaults, set(own))])


def shared_parameters(defaults: Mapping[str, Any], taken: set[str]) -> list[inspect.Parameter]:
    """The shared options as keyword-only parameters, those in ``taken`` left out."""
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(name, kind, default=defaults.get(name, option.default))
        for name, option in OPTIONS.items()
        if name not in taken
    ]


def documented(doc: str | None) -> str | None:
    """A class's docstring with what holds for all optimizers after it."""
    if doc is None or SHARED_DOC in inspect.cleandoc(doc):
        return doc
    return f"{inspect.cleandoc(doc)}\n\n{SHARED_DOC}\n"
