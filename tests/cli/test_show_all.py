"""``hbcore show`` of everything that can be installed, in every form, on narrow and on coloured terminals."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import pytest

from hbcore import registry
from hbcore.cli import text
from hbcore.cli.main import main
from hbcore.registry import Registry, blocks

BLOCKS = [*blocks.NAMES, *(old for name in blocks.NAMES for old in blocks.aliases_of(name))]
CODECS = [codec.name for codec in registry.codecs()] + ["hb_ecc:bf16+8"]
OPTIMIZERS = registry.list_optimizers(aliases=True)


def show(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["show", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", OPTIMIZERS + BLOCKS + CODECS)
def test_everything_is_shown_in_sixty_columns_and_as_json(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    shown = show(capsys, name)
    code = ("    SplitOpt(", '        {"optimizer"', "    def chain", "        return (Parallel")
    assert not [line for line in shown.splitlines() if len(line) > 60 and not line.startswith(code)]
    facts = json.loads(show(capsys, name, "--json"))
    assert facts["name"].casefold() in " ".join(shown.split()).casefold() and facts["summary"] in " ".join(shown.split())
    assert facts["plugin"] == (registry.info(name).plugin if name in OPTIMIZERS else facts["distribution"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_kernels_as_text_and_as_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(show(capsys, name, "--kernel", "--json"))
    assert found["name"] == name and all("@triton.jit" in source for source in found["kernels"]) and found["kernels"]
    assert show(capsys, name, "--kernel") == "\n\n".join(found["kernels"]) + "\n"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("SplitOpt", "is made of other optimizers; name one of them"),
        ("Parallel", "is not built on hbcore's engine"),
        ("bf16+8", "is a codec, which becomes part of an optimizer's kernel"),
        ("Foreign", "is not built on hbcore's engine"),
    ],
)
@pytest.mark.parametrize("words", [[], ["--json"]])
def test_what_has_no_kernel_of_its_own_says_why(
    name: str, reason: str, words: list[str], foreign: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", name, "--kernel", *words]) == 2
    out = capsys.readouterr()
    assert out.out == "" and reason in out.err and out.err.count("\n") == 1


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that registers torch's own optimizers, besides the installed ones."""
    from importlib_metadata import EntryPoint

    from hbcore.api import OptimizerSpec, hookimpl
    from hbcore.registry.discovery import installed

    torch = pytest.importorskip("torch")

    class Needy(torch.optim.SGD):  # type: ignore[misc, name-defined]
        """Needs more than parameters."""

        def __init__(self, params: Any, size: int) -> None:
            super().__init__(params)

    manifest: Any = ModuleType("hb_foreign")
    manifest.API, manifest.Needy = (1, 0), Needy
    targets = {"Foreign": "torch.optim:Adam", "Closure": "torch.optim:LBFGS", "OnlySparse": "torch.optim:SparseAdam"}
    targets["Needy"] = "hb_foreign:Needy"

    def hb_optimizers() -> list[OptimizerSpec]:
        return [OptimizerSpec(name, target, f"{name}'s summary") for name, target in targets.items()]

    manifest.hb_optimizers = hookimpl(hb_optimizers)
    monkeypatch.setitem(sys.modules, "hb_foreign", manifest)
    made = Registry(lambda: [*installed(), EntryPoint("hb_foreign", "hb_foreign", "hbcore.plugins")])
    for name in ("info", "resolve", "codec_info", "load_codec"):
        monkeypatch.setattr(registry, name, getattr(made, name))


def test_a_registered_optimizer_of_torchs_is_shown_with_the_state_that_a_step_makes(
    foreign: None, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = show(capsys, "foreign")
    assert "exp_avg_sq  float32, 4 B\n" in shown and "not built on hbcore's engine" in shown
    facts = json.loads(show(capsys, "Foreign", "--json"))
    assert facts["bytes_per_parameter"] == pytest.approx(8, abs=0.01) and facts["plugin"] == "hb_foreign"
    assert {"name": "eps", "default": 1e-8, "bounds": "", "scheduled": False} in facts["hyperparameters"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Closure", "history_size"),
        ("OnlySparse", "state unknown: a trial step failed with RuntimeError"),
        ("Needy", "state unknown: a trial step failed with TypeError"),
    ],
)
def test_a_class_that_cannot_be_tried_is_shown_all_the_same(
    name: str, said: str, foreign: None, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = show(capsys, name)
    assert shown.startswith(f"{name}: {name}'s summary\n") and said in shown
    assert ("size  required" in shown) == (name == "Needy")
    json.loads(show(capsys, name, "--json"))


def test_colours_on_a_terminal_and_plain_text_without_rich(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    coloured = show(capsys, "SGD")
    assert "\x1b[1mSGD" in coloured
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    plain = show(capsys, "SGD")
    assert "\x1b" not in plain and plain.startswith("SGD: ")


def lines(rows: list[tuple[str, str, str]], columns: int | None) -> list[str]:
    return ["".join(piece for piece, _ in line) for line in text.table(rows, columns)]


def test_a_table_gives_its_last_cell_what_is_left_and_then_lines_of_its_own() -> None:
    rows = [("name", "= 1", "a few words of text that go on"), ("longer_name", "= 2", "")]
    assert lines(rows, None) == ["  name         = 1  a few words of text that go on", "  longer_name  = 2"]
    assert lines(rows, 44) == [
        "  name         = 1  a few words of text that",
        "                    go on",
        "  longer_name  = 2",
    ]
    assert lines(rows, 30) == ["  name         = 1", "      a few words of text that", "      go on", "  longer_name  = 2"]
    assert lines([], 30) == []


@pytest.mark.parametrize(
    ("given", "state", "total"),
    [
        ([], 8.0, 16.0),
        (["--ecc", "bf16+8"], 6.0, 14.0),
        (["--param-ecc", "bf16+16"], 10.0, 14.0),
        (["--ecc", "bf16+8", "--param-ecc", "bf16+8"], 7.0, 11.0),
        (["--storage-dtype", "bfloat16"], 4.0, 12.0),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_the_bytes_are_those_of_the_codecs_that_are_asked_for(capsys, given, state, total):
    assert main(["show", "AdamW", *given, "--json"]) == 0
    found = capsys.readouterr()
    facts = json.loads(found.out)
    assert (facts["bytes_per_parameter"], facts["memory"]["state"], facts["memory"]["total"]) == (state, state, total)
    assert found.err == ""


def test_state_in_host_memory_takes_none_of_the_device(capsys):
    assert main(["show", "AdamW", "--offload", "cpu", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert (memory["state"], memory["host"], memory["total"]) == (0.0, 8.0, 8.0)
    assert main(["show", "AdamW", "--offload", "cpu"]) == 0
    assert "host" in capsys.readouterr().out
    assert main(["show", "AdamW", "--offload", "disk"]) != 0
    assert "offload='disk' is not one of cpu" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bf16+8", "SplitOpt"])
def test_what_has_no_state_of_its_own_has_no_codec(capsys, name):
    assert main(["show", name, "--ecc", "bf16+8"]) != 0
    assert "--ecc: " in capsys.readouterr().err
