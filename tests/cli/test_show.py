"""``hbcore show NAME``, with a made-up class and description."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import pytest

from hbcore import introspect, registry
from hbcore.cli.main import main
from hbcore.registry import Registry


class Shown:
    """Not an optimizer."""

    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None: ...


def describe(cls: type) -> dict[str, Any]:
    return {
        "name": cls.__name__,
        "doc": "A rule for tests.",
        "hyperparameters": [
            {"name": "lr", "default": 0.1, "bounds": "[0, inf)", "scheduled": True},
            {"name": "betas", "default": (0.9, 0.99), "bounds": "", "scheduled": False},
        ],
        "options": [{"name": "caution", "default": False, "doc": "mask disagreeing updates"}],
        "slots": [{"name": "exp_avg", "transform": "adam", "dtype": "float32", "bytes_per_parameter": 4.0}],
        "bytes_per_parameter": 4.0,
        "memory": {"state": 4.0},
        "chain": ["adam", "decay", "lr"],
    }


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default registry's functions answer from a plugin that lives in memory; so does the engine's describe."""
    from importlib_metadata import EntryPoint

    from hbcore.api import Alias, OptimizerSpec, hookimpl

    manifest: Any = ModuleType("hb_shown")
    manifest.API = (1, 0)
    manifest.Shown = Shown

    def hb_optimizers() -> list[OptimizerSpec]:
        return [OptimizerSpec("Shown", "hb_shown:Shown", "a rule", "arXiv:1711.05101", frozenset({"capturable"}))]

    def hb_aliases() -> list[Alias]:
        return [Alias("OldShown", "Shown", {"caution": True})]

    manifest.hb_optimizers, manifest.hb_aliases = hookimpl(hb_optimizers), hookimpl(hb_aliases)
    monkeypatch.setitem(sys.modules, "hb_shown", manifest)
    made = Registry(lambda: [EntryPoint("hb_shown", "hb_shown", "hbcore.plugins")])
    for name in ("info", "resolve"):
        monkeypatch.setattr(registry, name, getattr(made, name))
    monkeypatch.setattr(introspect, "describe", describe)
    monkeypatch.setattr(introspect, "is_described", lambda cls: True)
    monkeypatch.delenv("COLUMNS", raising=False)


def test_the_text_has_every_fact(plugin: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "shown"]) == 0
    text = capsys.readouterr().out
    for fact in (
        "Shown: a rule",
        "A rule for tests.",
        "hb_shown (unknown unknown), hb_shown:Shown",
        "arXiv:1711.05101",
        "OldShown",
        "capturable",
        "adam -> decay -> lr",
        "Shown(params: 'Any', lr: 'float' = 0.1, **options: 'Any')",
        "  lr     = 0.1          in [0, inf), may be scheduled\n  betas  = (0.9, 0.99)\n",
        "  caution  = False  mask disagreeing updates",
        "state (4 bytes per parameter):\n  exp_avg  float32, 4 B  of adam",
    ):
        assert fact in text


def test_json_has_every_fact(plugin: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "Shown", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts.items() >= json.loads(json.dumps(describe(Shown))).items()
    assert facts["paper"] == "arXiv:1711.05101" and facts["aliases"] == ["OldShown"] and facts["plugin"] == "hb_shown"
    assert "asked_for" not in facts


def test_an_alias_is_shown_with_its_preset_and_no_warning(
    plugin: None, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    assert main(["show", "OldShown"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("OldShown is another name for Shown(caution=True)\n")
    assert "OldShown(params: 'Any', lr: 'float' = 0.1, *, caution=True, **options: 'Any')" in text
    assert not [w for w in recwarn if w.category is FutureWarning]


def test_an_unknown_name_is_one_line_and_status_2(plugin: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "Shwon"]) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.startswith("hbcore: No installed plugin provides the optimizer 'Shwon'")
    assert "Did you mean Shown?" in out.err and out.err.count("\n") == 1


def test_a_name_is_required() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["show"])
    assert caught.value.code == 2


def test_the_engines_own_description_has_what_show_prints() -> None:
    engine = pytest.importorskip("hbcore.introspect")
    from hbcore.api import Optimizer
    from hbcore.cli.show import _lines
    from hbcore.rules.moments import ScaleByAdam

    class Tiny(Optimizer):
        """A rule for this test."""

        def __init__(self, params: Any, lr: float = 1e-3, betas: Any = (0.9, 0.99), eps: float = 1e-8, **options: Any):
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps}, options)

        @staticmethod
        def chain(h: Any) -> Any:
            return (ScaleByAdam(h.betas, h.eps),)

    facts = engine.describe(Tiny)
    assert facts.keys() == describe(Shown).keys()
    origin = dict.fromkeys(("summary", "plugin", "distribution", "version", "target", "paper", "signature"), "")
    lines = _lines(facts | origin | {"aliases": [], "capabilities": []}, None)
    text = "\n".join("".join(piece for piece, _ in line) for line in lines)
    assert "betas" in text and "exp_avg_sq  float32, 4 B  of adam" in text and "state (8 bytes per parameter)" in text


def test_the_generated_kernels_are_shown_a_module_for_each_lane(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "SOAP", "--kernel"]) == 0
    text = capsys.readouterr().out
    assert text.count("import triton\n") == 2
    assert "p_stack_update" in text and "weight_decay -> lr -> apply" in text


def test_the_chain_is_what_a_matrix_meets() -> None:
    engine = pytest.importorskip("hbcore.introspect")
    ball = pytest.importorskip("hb_muon").HyperBallAdamW
    assert engine.describe(ball)["chain"] == ["adam", "weight_decay", "hyperball"]  # which applies its step itself
    assert engine.describe(ball, warmup_steps=2, use_ema=True)["chain"][-2:] == ["hyperball", "parameter_ema"]
