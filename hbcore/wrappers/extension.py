"""Optimizers that add hyperparameters and rules to another optimizer, whichever the user chooses: Lookahead, a projection."""

from __future__ import annotations

import copyreg
import functools
import inspect
from typing import Any, ClassVar

from typing_extensions import Self

from hbcore import registry
from hbcore.declaration import SHARED_DOC
from hbcore.errors import OptionError, RuleError
from hbcore.optimizer import Optimizer


class ExtensionType(type):
    """The type of extensions: a call of one that has no base is a call of its class over the base that is passed."""

    default_base: str | type[Optimizer] | None

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if base_of(cls) is not None:
            return super().__call__(*args, **kwargs)
        return _over(cls, _class(cls, kwargs.pop("base", cls.default_base)))(*args, **kwargs)


class Extension(Optimizer, metaclass=ExtensionType):
    """Base of optimizers that extend another one::

        class Lookahead(Extension):
            k: int = 5
            alpha: float = 0.5
            default_base = "AdamW"

            @classmethod
            def chain(cls, h):
                return (*super().chain(h), SlowWeights(h.k, h.alpha))

        Lookahead(params, lr=1e-3, betas=(0.9, 0.95), k=6)  # over AdamW
        Lookahead(params, base="SGD", momentum=0.9)

    Both make an instance of a subclass of ``Lookahead`` and of the base, in this order: :meth:`over`. Its hyperparameters are
    the base's and then the extension's, and everything else follows from that. With a base of one's own choice, two lines of
    Python say the same, and show type checkers every hyperparameter::

        class LookaheadSGD(Lookahead, SGD):
            '''SGD with slow weights.'''

    ``super().chain(h)`` are the base's rules. Those of the extension go before or after them; at the stage ``"after"`` they see
    what the step made of the parameter.

    Raises:
        OptionError: no base was passed and there is no default, or the base is not built on hbcore's engine.
        RuleError: extension and base have a hyperparameter of the same name.
    """

    default_base: ClassVar[str | type[Optimizer] | None] = None
    """The base where the user passes none: a registered name, or a class."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if (base := base_of(cls)) is None:
            cls.__signature__ = _WithDefaultBase()  # type: ignore[attr-defined]
            return
        added = {name for c in cls.__mro__ if issubclass(c, Extension) and base_of(c) is None for name in c.own}
        if both := sorted(added & {*base.own}):
            raise RuleError(
                f"{cls.__name__}: the extension and {base.__name__} both have a hyperparameter {both[0]!r}, and a group has "
                "one entry of that name; rename the extension's."
            )

    @classmethod
    def over(cls, base: str | type[Optimizer]) -> type[Self]:
        """The class of this extension over ``base``; the same class each time.

        Args:
            base: a registered name, or a class.

        Raises:
            OptionError, RuleError, RegistryError: see the class; or the name is unknown.
        """
        made: type[Self] = _over(cls, _class(cls, base))
        return made


def base_of(cls: type[Any]) -> type[Optimizer] | None:
    """What an extension's class extends; None if that is still to be chosen."""
    after = cls.__mro__[cls.__mro__.index(Extension) + 1]
    return None if after is Optimizer else after


def _class(extension: type[Any], base: Any) -> Any:
    """The class that ``base`` means."""
    found = registry.get(base) if isinstance(base, str) else base
    if base is None or not isinstance(found, type) or not issubclass(found, Optimizer):
        said = "needs a base" if base is None else f"cannot extend {getattr(base, '__name__', repr(base))}"
        raise OptionError(f"{extension.__name__} {said}; pass an optimizer that is made of rules, such as base='AdamW'.")
    if issubclass(found, Extension) and base_of(found) is None:
        return found.over(_class(found, found.default_base))
    return found


@functools.cache
def _over(extension: Any, base: Any) -> Any:
    if (taken := base_of(extension)) is not None:
        raise OptionError(f"{extension.__name__} already extends {taken.__name__}; name the extension without its base.")
    text = [(inspect.getdoc(cls) or "").replace(SHARED_DOC, "").strip() for cls in (extension, base)]
    doc = f"{extension.__name__} over {base.__name__}.\n\n{text[0]}\n\n{base.__name__}: {text[1]}"
    body = {"__module__": extension.__module__, "__doc__": doc, "_made_of": (extension, base)}
    return ExtensionType(f"{extension.__name__}{base.__name__}", (extension, base), body)


class _WithDefaultBase:
    """The signature of an extension without a base: that over its default base, and ``base``. Loads it when asked for."""

    def __get__(self, instance: object, cls: Any) -> inspect.Signature:
        if (chosen := base_of(cls)) is not None:  # a subclass that declares nothing
            return inspect.signature(chosen)
        base = cls.default_base
        shown = inspect.signature(_over(cls, _class(cls, base)))
        parameter = inspect.Parameter("base", inspect.Parameter.KEYWORD_ONLY, default=base)
        names = list(shown.parameters.values())
        at = next((i for i, p in enumerate(names) if p.kind is p.KEYWORD_ONLY), len(names))
        return shown.replace(parameters=[*names[:at], parameter, *names[at:]])


def _reduced(cls: Any) -> Any:
    """How pickle writes an extension's class: one that :meth:`Extension.over` made, by the names of what it is made of."""
    made_of = vars(cls).get("_made_of")
    return cls.__qualname__ if made_of is None else (_over, made_of)


copyreg.pickle(ExtensionType, _reduced)
