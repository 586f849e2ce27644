"""The measured optimizers: class, arguments and precision. Does not import torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple

from hbcore.cli.compare.options import Entry
from hbcore.errors import HbcoreError, OptionError, UnknownOptimizerError


class Precision(NamedTuple):
    """One precision of the benchmark: the dtype of parameters and gradients, and the requested dtype of state."""

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
        label: its name in tables.
        family: the rule, by class name. Peers of a family get the same hyperparameters and are compared with each other.
        source: ``hbcore``, or the library that provides it.
        target: a registered name, or ``module:Class``.
        kwargs: constructor arguments.
        only: the shape sets to measure it on; all if empty.
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

        ``consume_grad=False`` is set if the class has it: a step that consumes its gradients leaves nothing for the next one,
        and nine steps of a window of ten would return at once.
        """
        arguments, wanted = dict(self.kwargs), {"consume_grad": False}
        if precision.storage != "float32":
            wanted["storage_dtype"] = precision.storage  # type: ignore[assignment]
        arguments.update((key, value) for key, value in wanted.items() if key not in arguments and accepts(cls, key))
        if self.source == "flashoptim" and precision.param == "float32":
            arguments["master_weight_bits"] = None  # it refuses any other value for float32 parameters
        return arguments


def accepts(cls: type[Any], key: str) -> bool:
    """Whether the constructor has a parameter ``key``."""
    return key in inspect.signature(cls).parameters


def imported(target: str) -> type[Any]:
    """Import ``module:Class``. Raises ImportError or AttributeError."""
    module, _, name = target.partition(":")
    found: type[Any] = getattr(import_module(module), name)
    return found


def find(name: str) -> type[Any]:
    """The class registered as ``name``, or else imported from ``module:Class``.

    Raises:
        RegistryError: it is neither registered nor importable.
        OptionError: what is found is no optimizer class.
    """
    import hbcore  # imported here, so that timing in a fresh process includes discovery

    try:
        found: Any = hbcore.get(name)
    except (UnknownOptimizerError, ModuleNotFoundError) as unknown:  # a bare checkout may lack the registry's dependencies
        if ":" not in name:
            raise
        try:
            found = imported(name)
        except (ImportError, AttributeError) as error:
            raise UnknownOptimizerError(f"{name!r} is neither registered nor importable: {error}") from unknown
    import torch

    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        kind = "class" if isinstance(found, type) else type(found).__name__
        raise OptionError(f"{name!r} is a {kind}, not a subclass of torch.optim.Optimizer")
    return found


def try_out(contenders: Iterable[Contender], precisions: Iterable[Precision]) -> None:
    """Build every contender once on one small matrix, so that wrong arguments are found before the first measurement.

    Raises:
        OptionError: a constructor rejects its arguments, or the optimizer needs a closure, which a benchmark has not.
    """
    import torch

    for precision in precisions:
        for one in contenders:
            cls = one.load()
            param = torch.nn.Parameter(torch.zeros(8, 8, dtype=getattr(torch, precision.param)))
            try:
                made = cls([("layer.0", param)], **one.arguments(cls, precision))
            except Exception as error:  # a plugin's constructor may raise anything; the user gets one line
                said = str(error) if isinstance(error, HbcoreError) else f"{type(error).__name__}: {error}"
                raise OptionError(f"{one.label}: {said}") from error
            if getattr(made, "requires_closure", False):
                raise OptionError(f"{one.label}: its steps need a closure that computes the loss; a benchmark has no loss")


def from_entries(entries: Iterable[Entry], backends: Sequence[str]) -> list[Contender]:
    """hbcore's contenders: one per entry, or one per entry and backend.

    Raises:
        HbcoreError: a name is unknown, or its class has no backends.
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
