"""The page of one optimizer, and the page that lists them all: Markdown, from what plugins declare and docstrings say."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from typing import Any

import torch

from docs_site import prose, results
from docs_site.catalogue import FAMILIES, Entry
from hbcore import introspect, registry
from hbcore.engine.shared_options import OPTIONS
from hbcore.errors import HbcoreError

NEEDS = {
    "closure": "`step` needs a closure that computes the loss and its gradients",
    "modes": "call `optimizer.eval()` before validation and saving weights, `optimizer.train()` after it",
    "primes": "a matrix's first gradient initialises its state and moves nothing",
    "sparse": "accepts only sparse gradients",
    "random": "draws random numbers, from its option `seed` alone",
    "joint": "all parameters of a group are one vector; with `multi_tensor=False` it is another optimizer",
    "capturable": "accepts `capturable=True`, for CUDA graphs",
}
"""Capability -> what a user has to know."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; empty if it has no rows."""
    titles = list(head)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles), *lines]) if lines else ""


def shown(value: Any) -> str:
    """A default as code."""
    text = getattr(value, "__name__", None) if inspect.isroutine(value) or inspect.isclass(value) else None
    return "`" + (text or repr(value)).replace("|", "\\|") + "`"


def page(entry: Entry, pages: Collection[str], path: str) -> str:
    """The page; ``path`` is the caption of the picture of its path, which replaces ``<!-- picture: NAME -->``."""
    described = prose.describe(entry.cls, pages)
    facts = introspect.describe(entry.cls)
    sections = [
        f"# {entry.name}",
        f"{prose.inline(entry.info.spec.summary, pages)}.",
        _facts(entry, facts),
        _use(entry),
        "## Rule",
        described.text,
        "## Path",
        f"<!-- picture: {entry.name} -->",
        path,
        "## Arguments",
        _arguments(facts, described),
        f"*Scheduled*: a scheduler may change it between steps. Besides these it takes [the options that all optimizers "
        f"share](../options.md).{_changed(facts)}",
        "## State",
        _state(facts, described),
        "## Where it runs",
        _where(entry),
        *_titled("## Speed", _speed(entry.name)),
        *_titled("## If you used", _instead(entry, facts)),
        *_titled("## Warnings and errors", "\n\n".join(v for k, v in described.sections.items() if k != "State")),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _titled(title: str, body: str) -> list[str]:
    return [title, body] if body else []


def _facts(entry: Entry, facts: dict[str, Any]) -> str:
    spec = entry.info.spec
    rows = [
        (
            "family",
            f"[{FAMILIES[entry.info.plugin]}](../project/plugins/{entry.info.plugin}.md), in `{entry.info.distribution}`",
        ),
        ("paper", prose.inline(spec.paper, ())),
        ("state", f"{facts['bytes_per_parameter']:.3g} bytes per parameter, for a 32 x 32 float32 matrix"),
        *(("to know", note) for name, note in NEEDS.items() if name in spec.capabilities),
    ]
    return table(("", ""), rows)


def _use(entry: Entry) -> str:
    small, declared = entry.info.spec.small_lr, inspect.signature(entry.cls).parameters.get("lr")
    lr = small or (declared and declared.default)
    call = f'optimizer = hbcore.get("{entry.name}")(model.named_parameters()' + (f", lr={lr})" if lr else ")")
    note = f"{small:g} is a learning rate for models of up to a few million parameters. " if small else ""
    return f"```python\n{call}\n```\n\n{note}`hbcore show {entry.name}` prints the facts of this page."


def _arguments(facts: dict[str, Any], described: prose.Described) -> str:
    rows = []
    for row in facts["hyperparameters"]:
        default = shown(row["default"]) if "default" in row else "required"
        bounds = f"`{row['bounds']}`" if row["bounds"] else ""
        meaning = described.arguments.get(row["name"], "")
        rows.append((f"`{row['name']}`", default, bounds, "yes" if row["scheduled"] else "", meaning))
    return table(("argument", "default", "range", "scheduled", "meaning"), rows)


def _changed(facts: dict[str, Any]) -> str:
    """The shared options whose default this class changes."""
    own = [f"`{o['name']}` is {shown(o['default'])}" for o in facts["options"] if o["default"] != OPTIONS[o["name"]].default]
    return f" Here {', and '.join(own)} by default." if own else ""


def _state(facts: dict[str, Any], described: prose.Described) -> str:
    rows = [
        (
            f"`{slot['name']}`",
            f"`{slot['transform']}`",
            slot["dtype"],
            f"{slot['bytes_per_parameter']:.3g}",
            "no, it follows from the others" if slot["derived"] else "yes",
        )
        for slot in facts["slots"]
    ]
    memory = ", ".join(f"{name} {size:.3g}" for name, size in facts["memory"].items() if size)
    text = described.sections.get("State", "")
    text = text[:1].upper() + text[1:]
    return "\n\n".join(
        filter(
            None,
            [
                text,
                table(("slot", "of the rule", "dtype", "bytes per parameter", "saved"), rows),
                f"Memory per parameter of a 32 x 32 float32 matrix, in bytes: {memory}. "
                "[`ecc` and `param_ecc`](../options.md#storage) make it smaller; `hbcore.memory` computes it for a model.",
            ],
        )
    )


def _where(entry: Entry) -> str:
    capabilities = entry.info.spec.capabilities
    try:
        kernels = len(introspect.kernels(entry.cls))
    except HbcoreError as error:
        generated = f"No kernel is generated for it: {prose.inline(str(error), ())}"
    else:
        what = "its whole chain is one generated function" if kernels == 1 else f"its chain is {kernels} generated functions"
        around = ", with matrix operations of torch between them" if kernels > 1 else ""
        generated = (
            f"For a matrix, {what}{around}: Triton on NVIDIA GPUs, C++ or Inductor on CPUs, and plain torch where none of them "
            f"works, see [compiling](../compiling.md). `hbcore show {entry.name} --kernel` prints the Triton source."
        )
    if "sparse" in capabilities:
        ranks = "Under FSDP2 it is refused: a table of sparse rows must stay whole."
    elif "joint" in capabilities:
        ranks = "Under FSDP2 each rank has its own rows of the vector, and sums are reduced over ranks."
    elif "matrix" in capabilities:
        ranks = "Under FSDP2 each matrix is computed whole by one rank, its owner; elementwise parts run on each rank's rows."
    else:
        ranks = "Under FSDP2 each rank updates its own rows; sums over a parameter or the model are reduced over ranks."
    return f"{generated}\n\n{ranks} See [distributed training](../distributed.md)."


def _speed(name: str) -> str:
    rows = []
    for figure in results.of(name):
        peer = results.fastest_peer(figure)
        rows.append(
            (
                figure.device,
                figure.shapes,
                figure.dtype,
                f"`{figure.options}`" if figure.options else "",
                f"{figure.ms:.3g}",
                f"{peer.label}: {peer.ms:.3g}" if peer else "",
                f"`{figure.file}.json`",
            )
        )
    if not rows:
        return ""
    head = ("device", "parameters", "dtype", "options", "ms a step", "fastest other in the same run", "file")
    return (
        f"{table(head, rows)}\n\nMeasured with noise as gradients, see [benchmarks](../project/benchmarks.md). Compare "
        "within a row only: machines differ, and so do the versions of hbcore that were measured."
    )


def _instead(entry: Entry, facts: dict[str, Any]) -> str:
    rows = []
    for name in entry.info.aliases:
        alias = registry.info(name).alias
        assert alias is not None
        preset = f", {alias.preset_text}" if alias.preset else ""
        rows.append((f"`{name}`", f'`hbcore.get("{entry.name}")(params{preset})`'))
    other = getattr(torch.optim, entry.name, None)
    if other is not None:
        rows.append((f"`torch.optim.{entry.name}`", f'`hbcore.get("{entry.name}")(params{_torch_defaults(other, facts)})`'))
    body = table(("name", "write"), rows)
    if other is not None:
        body += "\n\nThe arguments restore torch.optim's defaults. [Differences](../differences.md) lists what else differs."
    return body


def _torch_defaults(other: Any, facts: dict[str, Any]) -> str:
    """The arguments that both have, where torch's default is another."""
    here = {row["name"]: row.get("default") for row in [*facts["hyperparameters"], *facts["options"]]}
    skipped = {"foreach", "fused", "capturable", "maximize", "differentiable"}
    there = {n: p.default for n, p in inspect.signature(other).parameters.items() if n in here and n not in skipped}
    return "".join(
        f", {name}={value!r}"
        for name, value in there.items()
        if value != here[name] and isinstance(value, (int, float, tuple, str, type(None)))
    )


def listing(entries: Iterable[Entry], paths: str) -> str:
    """The page of all optimizers, by family; ``paths`` explains the pictures of their paths."""
    parts = [
        "# Optimizers",
        "The optimizers of hbcore's own families; each has a page. [Which optimizer](../choosing.md) helps to choose, and "
        "[the shared options](../options.md) work with all of them. *State* is in bytes per parameter, for a 32 x 32 float32 "
        "matrix.",
    ]
    known = list(entries)
    for plugin, title in FAMILIES.items():
        rows = []
        for entry in (e for e in known if e.info.plugin == plugin):
            size = introspect.describe(entry.cls)["bytes_per_parameter"]
            rows.append((f"[{entry.name}]({entry.name}.md)", prose.inline(entry.info.spec.summary, ()), f"{size:.3g}"))
        parts += [f"## {title}", table(("optimizer", "what it is", "state"), rows)]
    return "\n\n".join([*parts, "## Paths", paths]) + "\n"
