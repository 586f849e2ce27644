"""What is measured: an optimizer class, how it is built, and for which precision. Imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple

from hbcore.cli.compare.options import Entry
from hbcore.errors import OptionError, UnknownOptimizerError


class Precision(NamedTuple):
    """A column of the benchmark: the dtype of parameters and gradients, and the one that state is asked to be in."""

    name: str
    param: str
    storage: str


PRECISIONS: Mapping[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("fp32", "float32", "float32"),
        Precision("bf16", "bfloat16", "bfloat16"),
        Precision("bf16+fp32state", "bfloat16", "float32"),
    )
}


@dataclass(frozen=True)
class Contender:
    """One bar of the chart.

    Attributes:
        label: what tables call it.
        family: the rule, by class name. Peers of one family get the same hyperparameters and are compared to each other.
        source: ``hbcore``, or the library it comes from.
        target: a registered name, or ``module:Class``.
        kwargs: constructor arguments.
        only: the shape sets it takes part in; all, if empty.
    """

    label: str
    family: str
    source: str
    target: str
    kwargs: Mapping[str, Any]
    only: tuple[str, ...] = ()

    def load(self) -> type[Any]:
        """Import the class."""
        return find(self.target) if self.source == "hbcore" else imported(self.target)

    def arguments(self, cls: type[Any], precision: Precision) -> dict[str, Any]:
        """The constructor arguments at this precision.

        A step that consumes its gradients leaves nothing to do for the next one, and a window of ten would time nine that
        return at once: ``consume_grad=False`` wherever the class has it.
        """
        arguments, wanted = dict(self.kwargs), {"consume_grad": False}
        if precision.storage != "float32":
            wanted["storage_dtype"] = precision.storage  # type: ignore[assignment]
        arguments.update((key, value) for key, value in wanted.items() if key not in arguments and accepts(cls, key))
        if self.source == "flashoptim" and precision.param == "float32":
            arguments["master_weight_bits"] = None  # float32 parameters have no bits to spare; it refuses any other value
        return arguments


def accepts(cls: type[Any], key: str) -> bool:
    """Whether the constructor names ``key``."""
    return key in inspect.signature(cls).parameters


def imported(target: str) -> type[Any]:
    """The attribute that ``module:Class`` names. Raises ImportError or AttributeError."""
    module, _, name = target.partition(":")
    found: type[Any] = getattr(import_module(module), name)
    return found


def find(name: str) -> type[Any]:
    """The class registered as ``name``, or else imported from ``module:Class``.

    Raises:
        RegistryError: it is not registered, and is no importable class either.
    """
    import hbcore  # looked up here, so that a fresh process times discovery with the rest

    try:
        return hbcore.get(name)
    except (UnknownOptimizerError, ModuleNotFoundError) as unknown:  # in a bare checkout, what the registry needs may be absent
        if ":" not in name:
            raise
        try:
            return imported(name)
        except (ImportError, AttributeError) as error:
            raise UnknownOptimizerError(f"{name!r} is neither registered nor importable: {error}") from unknown


def from_entries(entries: Iterable[Entry], backends: Sequence[str]) -> list[Contender]:
    """hbcore's contenders: every entry, or every entry with each of ``backends``.

    Raises:
        HbcoreError: a name is unknown, or its class knows no backends.
    """
    contenders: list[Contender] = []
    for entry in entries:
        cls = find(entry.name)
        one = Contender(entry.label, cls.__name__, "hbcore", entry.name, entry.kwargs)
        if backends and not accepts(cls, "compile"):
            raise OptionError(f"--compile: {entry.name} has no option 'compile'")
        contenders += [
            replace(one, label=f"{entry.label} [{backend}]", kwargs={**entry.kwargs, "compile": backend})
            for backend in backends
        ] or [one]
    return contenders
