"""What holds for every example without a line for it in the package: backends, compressed state, shards, and its manifest."""

from __future__ import annotations

import ast
import re
import sys
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from distributed import jobs
from distributed.ranks import on_ranks

from hbcore.registry import Registry
from hbcore.testing import CHECKS, Check, Subject

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
PACKAGES = sorted(path.parent.name for path in HERE.glob("hb_*/pyproject.toml"))
SOURCES = sorted(HERE.glob("hb_*/src/hb_*/*.py"))
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Signum": {},
    "LAMB": {"weight_decay": 0.1},
    "NorMuon": {},
    "Prodigy": {"d0": 0.01},
    "Lookahead": {"k": 2},
}
"""Name -> arguments to train with."""

ECC = pytest.mark.parametrize("ecc", [{}, {"ecc": "bf16+8"}], ids=["plain", "ecc"])
ENGINE = r"triton|inductor|cpp|compile|cuda|ecc|codec|distributed|dtensor|fsdp|shard\w*|rank|mesh|checkpoint|state_dict"


def project(package: str) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((HERE / package / "pyproject.toml").read_text())["project"]
    return found


def specs() -> list[Any]:
    """Of every optimizer, from the manifests."""
    return [spec for package in PACKAGES for spec in getattr(import_module(f"{package}.plugin"), "OPTIMIZERS", ())]


CLASSES = {spec.name: resolve_name(spec.target) for spec in specs()}


def test_the_table_has_every_optimizer() -> None:
    assert CLASSES.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name if path.stem != "__init__" else path.parent.name)
def test_no_source_has_a_line_for_the_engine(path: Path) -> None:
    """Nor imports anything of hbcore but its API."""
    text = path.read_text()
    if path.parent.name != "hb_log8":  # a codec speaks of codecs
        assert not re.findall(rf"\b(?:{ENGINE})\b", text, flags=re.IGNORECASE)
    imported = {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for a in n.names}
    assert {m for m in imported if m and m.startswith("hbcore")} <= {"hbcore.api"}


def trained(name: str, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """The parameters of a small model after six steps, and their optimizer."""
    model, optimizer = jobs.build(CLASSES[name], {**OPTIMIZERS[name], **options}, "alone")
    jobs.train(model, optimizer, range(6))
    return jobs.whole(model), optimizer


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, x in theirs.items():
        assert float((ours[name] - x).norm() / x.norm()) < 1e-5, name


@ECC
@pytest.mark.parametrize("backend", ["inductor", "triton", "cpp"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_backend_trains_the_same(name: str, backend: str, ecc: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "inductor":  # the graphs as they are; compiling takes seconds
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    expected, _ = trained(name, compile="eager", **ecc)
    found, optimizer = trained(name, compile=backend, **ecc)
    assert backend in optimizer.report.backend and not optimizer.report.reasons
    assert_near(found, expected)
    start = jobs.whole(jobs.Model())
    assert all(not torch.equal(found[each], start[each]) for each in start)


@pytest.mark.broad  # processes
@ECC
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_ranks_train_the_same_and_resume_exactly(name: str, ecc: dict[str, Any]) -> None:
    cls, options = CLASSES[name], {"compile": "eager", **OPTIMIZERS[name], **ecc}
    expected, _ = trained(name, compile="eager", **ecc)
    for found in on_ranks(2, jobs.follow, cls, options, "fsdp"):
        assert_near(found, expected)
    for straight, resumed, _ in on_ranks(2, jobs.resume, cls, options):
        assert all(torch.equal(resumed[each], straight[each]) for each in straight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compressed_state_is_smaller_and_trains_nearly_the_same(name: str) -> None:
    (plain, one), (found, other) = trained(name, compile="eager"), trained(name, compile="eager", ecc="bf16+8")
    for each, start in jobs.whole(jobs.Model()).items():
        assert float((found[each] - plain[each]).norm() / (plain[each] - start).norm()) < 0.01, each
    size, least = (sum(t.nbytes for s in o.state.values() for t in s.values()) for o in (one, other))
    assert least < size


def declared() -> list[Any]:
    """What a manifest's capabilities promise, besides what is checked of every optimizer."""
    found = [(c, Subject(CLASSES[spec.name], spec.capabilities)) for spec in specs() for c in CHECKS if c.needs]
    return [pytest.param(c, s, id=f"{s}-{c.name}") for c, s in found if c.applies(s.capabilities)]


@pytest.mark.parametrize(("check", "subject"), declared())
def test_declared_capabilities_hold(check: Check, subject: Subject) -> None:
    check.run(subject)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_example_is_a_package_to_publish(package: str) -> None:
    about, rule = project(package), package.removeprefix("hb_")
    assert about["name"] == package and about["version"] == import_module(package).__version__
    assert about["entry-points"] == {"hbcore.plugins": {package: f"{package}.plugin"}}
    assert about["license"] == "BSD-2-Clause" and (HERE / package / "LICENSE").exists()
    registry = Registry(lambda: [EntryPoint(package, f"{package}.plugin", "hbcore.plugins")])
    assert all(registry.get(name) is CLASSES[name] for name in registry.list_optimizers())
    layout = {f"src/{package}/{name}" for name in ("__init__.py", "plugin.py", f"{rule}.py", "py.typed")}
    assert all((HERE / package / path).exists() for path in (*layout, "README.md", f"tests/test_{rule}.py"))
    imported = {
        node.module.partition(".")[0]
        for path in (HERE / package / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    needed = {name for name in imported if name.startswith("hb") and name != package}
    assert {re.split(r"[<>=]", each)[0] for each in about["dependencies"]} == needed
    assert f"({package}/README.md)" in (HERE / "README.md").read_text()
