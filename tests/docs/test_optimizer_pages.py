"""The page of each optimizer says what its class says."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
from docs_site import catalogue, optimizer_page, prose

import hbcore
from hbcore.engine.shared_options import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name for name in hbcore.list_optimizers() if hbcore.info(name).plugin in catalogue.FAMILIES]


@pytest.fixture(scope="module")
def entries():
    return {entry.name: entry for entry in catalogue.entries()}


@pytest.fixture(scope="module")
def page(entries):
    def written(name: str) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return optimizer_page.page(entries[name], entries.keys(), "the caption")

    return written


def rows(text: str, section: str) -> dict[str, list[str]]:
    """The cells of a section's table, by the first of each row."""
    body = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    found = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in body.splitlines() if line.startswith("|")
    ]
    return {row[0].strip("`"): row for row in found[2:]}


def test_every_family_has_a_title_and_every_optimizer_a_page(entries):
    declared = {
        p.name for p in (ROOT / "plugins").iterdir() if any(hbcore.info(n).plugin == p.name for n in hbcore.list_optimizers())
    }
    assert declared == set(catalogue.FAMILIES)
    assert sorted(entries) == NAMES and len(NAMES) > 40


@pytest.mark.parametrize("name", NAMES)
def test_a_page_states_every_argument_with_its_default_and_meaning(name, page):
    text = page(name)
    cls = hbcore.get(name)
    own = {
        n: p.default
        for n, p in inspect.signature(cls).parameters.items()
        if n != "params" and p.kind is not p.VAR_KEYWORD and (n not in OPTIONS or n in getattr(cls, "own", ()))
    }
    table = rows(text, "Arguments")
    assert list(table) == list(own)
    for argument, default in own.items():
        spelled = default.__name__ if isinstance(default, type) else repr(default)
        assert table[argument][1].replace("\\|", "|") in (f"`{spelled}`", f"`{getattr(default, '__name__', None)}`")
    for option, parameter in inspect.signature(cls).parameters.items():
        if option in OPTIONS and option not in own and parameter.default != OPTIONS[option].default:
            assert f"`{option}` is `{parameter.default!r}`" in text
    assert f"# {name}\n" in text and f"<!-- picture: {name} -->" in text and "the caption" in text
    assert not re.search(r":\w+:`|(?<!`)``(?!`)|^\.\. ", text, flags=re.MULTILINE), "reStructuredText is left"


@pytest.mark.parametrize("name", [n for n in NAMES if not {"closure", "sparse"} & hbcore.info(n).spec.capabilities])
def test_a_page_states_the_bytes_that_state_takes(name, page):
    weight = torch.nn.Parameter(torch.randn(32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = hbcore.get(name)([("w", weight)])
    for _ in range(2):
        weight.grad = torch.randn(32, 32)
        optimizer.step()
    stored = {k: v for k, v in optimizer.state[weight].items() if k != "step" and isinstance(v, torch.Tensor)}
    saved = {slot: float(row[3]) for slot, row in rows(page(name), "State").items() if row[4] == "yes"}
    assert saved == {k: pytest.approx(v.nbytes / 1024, rel=5e-3) for k, v in stored.items()}


@pytest.mark.parametrize("name", ["AdamW", "SOAP", "PSGDKron"])
def test_a_page_says_what_to_write_instead_of_other_names(name, page, entries):
    table = rows(page(name), "If you used")
    assert set(entries[name].info.aliases) <= set(table)
    for row in table.values():
        call = row[1].strip("`")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = eval(call, {"hbcore": hbcore, "params": [torch.nn.Parameter(torch.zeros(3, 2))]})
        assert type(built).__name__ == name


def test_torch_s_defaults_are_restored():
    entry = next(e for e in catalogue.entries() if e.name == "AdamW")
    written = rows(optimizer_page.page(entry, (), ""), "If you used")["torch.optim.AdamW"][1].strip("`")
    ours = eval(written, {"hbcore": hbcore, "params": [torch.nn.Parameter(torch.zeros(2))]}).param_groups[0]
    theirs = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).param_groups[0]
    assert {k: ours[k] for k in ("lr", "betas", "eps", "weight_decay")} == {
        k: theirs[k] for k in ("lr", "betas", "eps", "weight_decay")
    }


def test_the_list_links_to_every_page(entries):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = optimizer_page.listing(entries.values(), "how")
    assert re.findall(r"^\| \[\w+\]\((\w+)\.md\)", text, flags=re.MULTILINE) == [
        n for plugin in catalogue.FAMILIES for n in NAMES if hbcore.info(n).plugin == plugin
    ]


def test_a_docstring_becomes_markdown():
    parsed = prose.parse(
        """A rule, arXiv:2302.06675, see :class:`x.Lion` and :class:`Other`; ``a|b`` at https://example.org/a_b.

.. math::
    m = \\frac{a \\qquad b}{c} \\qquad
    p = \\left(q \\\\ + r\\right) \\\\
    + s

Args:
    lr, eps: both of them,
        in [0, 1).
    name: the | name.

State: ``exp_avg``.

Arguments of every optimizer:
    params: not here.""",
        {"Lion"},
    )
    assert parsed.text == (
        "A rule, [arXiv:2302.06675](https://arxiv.org/abs/2302.06675), see [Lion](Lion.md) and `Other`; `a\\|b` at "
        "[example.org/a_b](https://example.org/a_b).\n\n\\[\nm = \\frac{a \\qquad b}{c}\n\\]\n\n"
        "\\[\np = \\left(q \\\\ + r\\right) + s\n\\]"
    )
    assert parsed.arguments == {"lr": "both of them, in [0, 1).", "eps": "both of them, in [0, 1).", "name": "the \\| name."}
    assert parsed.sections == {"State": "`exp_avg`."}
