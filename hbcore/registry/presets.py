"""Makes the class of an alias with a preset; :mod:`hbcore.presets` is where such classes are importable from."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from typing import Any

HOME = "hbcore.presets"
"""The module that pickle finds them in."""


def subclass(base: type[Any], name: str, preset: dict[str, object]) -> type[Any]:
    """A subclass of ``base`` that fills in ``preset`` where the caller passes nothing.

    Args:
        base: the optimizer class.
        name: the alias' canonical spelling; the class' name.
        preset: keyword arguments of ``base``.

    Raises:
        TypeError: ``base`` takes no such keyword argument.
        ValueError: the preset gives a default to a parameter that stands before one without.
    """
    signature = inspect.signature(base)
    shown = _with_defaults(signature, base.__name__, preset)

    @functools.wraps(base.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind_partial(*args).arguments
        except TypeError:
            base.__init__(self, *args, **kwargs)  # too many positional ones: the base class says so itself
            return
        # Copied, so that no two optimizers share a list or a dict of the preset.
        missing = {key: copy.deepcopy(value) for key, value in preset.items() if key not in given}
        base.__init__(self, *args, **{**missing, **kwargs})

    text = ", ".join(f"{key}={value!r}" for key, value in preset.items())
    namespace = {
        "__init__": __init__,
        "__module__": HOME,
        "__qualname__": name,
        "__doc__": f"{base.__name__} with {text}.",
        "__signature__": shown,
    }
    return types.new_class(name, (base,), exec_body=lambda body: body.update(namespace))


def _with_defaults(signature: inspect.Signature, base: str, preset: dict[str, object]) -> inspect.Signature:
    """The signature with the preset as defaults; names that only ``**kwargs`` takes become keyword-only parameters."""
    parameters = dict(signature.parameters)
    rest = [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    for extra in rest:
        del parameters[extra.name]
    for key, value in preset.items():
        if key in parameters:
            parameters[key] = parameters[key].replace(default=value)
        elif rest:
            parameters[key] = inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=value)
        else:
            raise TypeError(f"its preset sets {key!r}, which {base} does not take; it takes {', '.join(parameters)}")
    return signature.replace(parameters=[*parameters.values(), *rest])
