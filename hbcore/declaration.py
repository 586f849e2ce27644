"""An optimizer class's annotated fields as its constructor: collected when the class is made, bound when it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hbcore.engine.entry_forms import check_length, fixed, lengths
from hbcore.engine.shared_options import OPTIONS
from hbcore.errors import HyperparameterError, RuleError

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
        written: the nearest base, or the class itself, that writes ``__init__``; None if all of them declare fields.
    """

    fields: dict[str, Any]
    annotations: dict[str, Any]
    options: dict[str, Any]
    written: type[Any] | None = None


def declare(cls: type[Any], construct: Callable[..., None]) -> None:
    """Make the declarations of a new class its constructor and its signature.

    Args:
        cls: a subclass of Optimizer.
        construct: what a constructor made of fields calls: ``construct(self, params, fields, options)``.
    """
    cls.__doc__ = documented(cls.__doc__)
    if "__signature__" in vars(cls):  # the class of an alias, which brings constructor and signature
        cls._declared = preset(inherited(cls), vars(cls)["__signature__"])
    elif "__init__" in vars(cls):
        cls._declared, cls.__signature__ = written_out(cls, cls.option_defaults)
    elif (declared := collect(cls, inherited(cls))) != cls._declared:
        cls._declared = declared
        cls.__init__ = constructor(cls, declared, constructs(declared, construct))
        cls.__signature__ = signature(declared)
    cls.own = tuple(cls._declared.fields)


def inherited(cls: type[Any]) -> Declaration:
    """What the bases of ``cls`` declare, merged as a dataclass merges its bases' fields.

    A base that writes ``__init__`` itself says alone what its own bases' parameters are.
    """
    merged = Declaration({}, {}, {})
    for base in reversed(cls.__mro__[1:]):
        declared: Declaration | None = vars(base).get("_declared")
        if declared is not None:
            merged = declared if declared.written is base else _merged(merged, declared)
    return merged


def _merged(base: Declaration, more: Declaration) -> Declaration:
    return Declaration(
        {**base.fields, **more.fields},
        {**base.annotations, **more.annotations},
        {**base.options, **more.options},
        more.written or base.written,
    )


def collect(cls: type[Any], base: Declaration) -> Declaration:
    """Read the annotated fields of ``cls``, and new defaults for its base's, and take them off the class.

    Raises:
        RuleError: a field has no default.
    """
    fields, annotations, options = dict(base.fields), dict(base.annotations), dict(base.options)
    found = {n: a for n, a in inspect.get_annotations(cls).items() if "ClassVar" not in str(a) and not n.startswith("_")}
    for name in [*found, *(n for n in dict.fromkeys((*fields, *OPTIONS)) if n not in found and n in vars(cls))]:
        if name not in vars(cls):
            raise RuleError(f"{cls.__name__}.{name} has no default; every hyperparameter needs one.")
        if name in found:
            annotations[name] = found[name]
        (fields if name in found or name in fields else options)[name] = vars(cls)[name]
        delattr(cls, name)  # a group's value is in its dict; an attribute would show the class's default for it
    return Declaration(fields, annotations, options, base.written)


def constructor(cls: type[Any], declared: Declaration, construct: Callable[..., None]) -> Callable[..., None]:
    """The ``__init__`` of ``cls``: normalises its arguments and calls ``construct(self, params, fields, options)``."""
    names = tuple(name for name in declared.fields if name not in OPTIONS)
    expected = lengths(declared.fields)

    def __init__(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) > len(names):
            raise TypeError(f"{cls.__name__}() takes params and {len(names)} more positional arguments, not {len(args)}.")
        given = dict(zip(names, args, strict=False))
        if twice := next((name for name in given if name in kwargs), None):
            raise TypeError(f"{cls.__name__}() got multiple values for argument {twice!r}.")
        given.update({name: kwargs.pop(name) for name in declared.fields if name in kwargs})
        fields = self.normalise({**declared.fields, **given})
        try:
            for name, length in expected.items():  # before they are the group's defaults, which new groups are compared with
                check_length(name, fields.get(name, ()), length)
        except HyperparameterError as error:
            raise HyperparameterError(f"{cls.__name__}: {error}") from None
        construct(self, params, fields, {**declared.options, **kwargs})
        self.after_init()

    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    __init__.__signature__ = signature(declared, with_self=True)  # type: ignore[attr-defined]
    return __init__


def constructs(declared: Declaration, construct: Callable[..., None]) -> Callable[..., None]:
    """What the constructor of a class calls: ``construct``, or its base's ``__init__`` where that is written out.

    The latter gets the parameters that it has; what is declared besides is left in ``self._added``, for ``construct`` to find.

    Raises:
        RuleError: that ``__init__`` calls one that is made of fields, which would run ``normalise`` and ``after_init`` too.
    """
    if (base := declared.written) is None:
        return construct
    if any(vars(b)["_declared"].fields for b in base.__mro__[1:] if "_declared" in vars(b)):
        raise RuleError(
            f"{base.__name__} writes __init__ over a class that declares fields, and no subclass of it can declare more; write "
            "__init__ there as well."
        )
    own = vars(base)["_declared"].fields

    def through(self: Any, params: Any, fields: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self._added = {name: value for name, value in fields.items() if name not in own}
        given = {name: value for name, value in fields.items() if name in own and value is not inspect.Parameter.empty}
        base.__init__(self, params, **given, **options)

    return through


def entries(optimizer: Any) -> dict[str, Any]:
    """The group entries that an optimizer's class declares, and their defaults: a pickle may be older than some of them.

    None if it writes ``__init__`` itself, whose parameters need not be entries.
    """
    declared: Declaration = optimizer._declared
    if declared.written is not None:
        return {}
    found = optimizer.normalise(dict(declared.fields))
    return {k: fixed(v) for k, v in found.items() if k not in OPTIONS and v is not inspect.Parameter.empty}


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
    annotations = {p.name: p.annotation for p in named if p.name in own}
    shown = inspect.Signature([*named, *shared_parameters(defaults, set(own))])
    return Declaration(own, annotations, dict(defaults), cls), shown


def preset(base: Declaration, shown: inspect.Signature) -> Declaration:
    """What an alias with a preset declares: what its base does, with the defaults of its own signature."""
    defaults = {name: p.default for name, p in shown.parameters.items()}
    fields = {name: defaults.get(name, default) for name, default in base.fields.items()}
    rest = {name: option.default for name, option in OPTIONS.items() if name in defaults and name not in fields}
    options = {name: defaults[name] for name, default in rest.items() if defaults[name] != default}
    return base._replace(fields=fields, options={**base.options, **options})


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
