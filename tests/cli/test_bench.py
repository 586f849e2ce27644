"""``hbcore bench`` on tiny shapes, on the CPU: that it measures what it says, of whom it says, and survives who fails."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hbcore.cli import bench
from hbcore.cli.bench import accuracy, chart, command, first_step, measure, memory, peers, report, shapes
from hbcore.cli.bench.contenders import PRECISIONS, Contender, find, from_entries
from hbcore.cli.bench.record import Row, baseline, deciles
from hbcore.cli.compare.options import Entry
from hbcore.errors import OptionError, UnknownOptimizerError

SMALL: list[shapes.Shape] = [(8, 4), (16,), (3, 2, 5)]
PARAMETERS = 78
CPU = torch.device("cpu")
LOCAL = """
import torch

class Recorder(torch.optim.SGD):
    log = []
    def step(self, closure=None):
        self.log.append(self.param_groups[0]["params"][0].grad.data_ptr())
        return super().step(closure)

class Greedy(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

class Lazy(torch.optim.SGD):
    def step(self, closure=None):
        pass

class Broken(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("no such kernel")

class Tired(torch.optim.SGD):
    calls = 0
    def step(self, closure=None):
        Tired.calls += 1
        if Tired.calls > 5:
            raise RuntimeError("too tired")
        return super().step(closure)

def model():
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)).requires_grad_(True)

def frozen():
    return model().requires_grad_(False)
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(shapes, "SETS", {**shapes.SETS, "tiny": lambda: list(SMALL), "square": lambda: [(4, 4)]})
    (tmp_path / "bench_local.py").write_text(LOCAL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bench_local", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(words)


def run(tmp_path: Path, *words: str) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]]]:
    """Exit status, ``bench.json``, and its rows by label."""
    common = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    if "--shapes" not in words and "--model" not in words:
        common += ["--shapes", "tiny"]
    status = bench.run(parse(*words, *common))
    content = json.loads((tmp_path / "bench.json").read_text())
    return status, content, {row["label"]: row for row in content["rows"]}


def row(label: str = "a", source: str = "hbcore", windows: Sequence[float] = (), **more: Any) -> Row:
    fixed = {"family": "AdamW", "optimizer": label, "kwargs": {}, "shapes": "tiny", "dtype": "fp32", "tensors": 3}
    return Row(label=label, source=source, windows_ms=list(windows), **{**fixed, "parameters": PARAMETERS, **more})


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("gpt2", 148, 124_439_808),
        ("qwen", 290, 494_032_768),
        ("vit_b", 152, 86_567_656),
        ("resnet50", 161, 25_557_032),
        ("gpt2_2d", 48, 84_934_656),
        ("qwen2d", 168, 357_826_560),
        ("sq8", 8, 8 * 1024**2),
    ],
)
def test_the_shape_sets_are_those_of_the_models(name: str, tensors: int, parameters: int) -> None:
    found = shapes.shapes_of(name)
    assert (len(found), shapes.count(found)) == (tensors, parameters)


def test_a_model_s_shapes() -> None:
    assert shapes.shapes_of("bench_local:model") == [(2, 3), (2,), (1, 2), (1,)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt3", "no set is named 'gpt3'; choose from square"),
        ("bench_local:frozen", "no parameters that require"),
        ("bench_local:absent", "AttributeError"),
        ("no_such_module:x", "ModuleNotFoundError"),
        ("os:getcwd", "str, not an nn.Module"),
    ],
)
def test_shapes_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        shapes.shapes_of(name)


def test_the_command_line_imports_no_torch() -> None:
    code = (
        "import argparse, sys; from hbcore.cli.bench import add_arguments, first_step; "
        "add_arguments(argparse.ArgumentParser()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_leaves_every_window_and_says_how_to_repeat_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["AdamW", "low=AdamW", "--optimizer-args", "lr=0.003", "low:betas=0.5,0.9", "--dtypes", "fp32,bf16", "--check"]
    status, content, _ = run(tmp_path, *words)
    assert status == 0
    assert content["schema"] == report.SCHEMA
    assert content["ceilings"]["copy_bytes_per_second"] > 1e6 and content["ceilings"]["matmul_flops_per_second"] > 1e6
    again = shlex.split(content["command"])
    assert again[:2] == ["hbcore", "bench"]
    assert vars(parse(*again[2:])) == vars(
        parse(*words, "--quick", "--device", "cpu", "--out", str(tmp_path), "--shapes", "tiny")
    )

    labels = ["AdamW", "low", "torch AdamW fused", "torch AdamW foreach"]
    assert [(r["dtype"], r["label"]) for r in content["rows"]] == [(t, label) for t in ("fp32", "bf16") for label in labels]
    for r in content["rows"]:
        assert r["status"] == "ok", r["error"]
        assert [len(r[key]) for key in ("windows_ms", "still_ms", "moving_ms", "host_ms")] == [2, 3, 3, 0]
        assert r["kwargs"]["lr"] == 0.003
        assert r["summary"]["floor_fraction"] == pytest.approx(r["floor_ms"] / r["summary"]["window_ms"])
        wide = r["dtype"] == "fp32"
        assert r["check"]["parameters"] < (1e-6 if wide else 1e-2)
        # Two moments, and step counters on top of them; three float32 numbers' worth of traffic for the parameters.
        assert (8 if wide else 4) * PARAMETERS < r["state_bytes"] < (8 if wide else 4) * PARAMETERS + 2048
        assert r["traffic_bytes"] == (12 if wide else 6) * PARAMETERS + 2 * r["state_bytes"]
    first = content["rows"][0]
    assert first["kwargs"]["consume_grad"] is False and first["backend"] == "eager"
    assert content["rows"][4]["kwargs"]["storage_dtype"] == "bfloat16"
    printed = capsys.readouterr().out
    assert "tiny, bf16: 3 tensors, 78 parameters" in printed and "x torch" in printed
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_hbcore_s_failure_is_a_row_and_the_exit_status(tmp_path: Path) -> None:
    names = ["Broken", "Tired", "Greedy", "Lazy"]
    status, _, rows = run(tmp_path, *(f"{n}=bench_local:{n}" for n in names), "AdamW", "--peers", "none")
    assert status == 1
    assert {label: r["status"] for label, r in rows.items()} == {
        **dict.fromkeys(["Broken", "Tired", "Greedy"], "failed"), "Lazy": "ok", "AdamW": "ok"
    }  # fmt: skip
    assert rows["Broken"]["error"] == "RuntimeError: no such kernel"
    assert len(rows["Tired"]["windows_ms"]) == 1, "what was measured before the failure is kept"
    assert "clears the gradients" in rows["Greedy"]["error"]
    assert "did not change the largest parameter" in rows["Lazy"]["notes"][0]
    assert len(rows["AdamW"]["windows_ms"]) == 2


def test_a_peer_s_failure_is_a_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("not this one")

    monkeypatch.setattr(torch.optim.SGD, "step", refuse)
    status, _, rows = run(tmp_path, "SGD")
    assert status == 0
    assert rows["SGD"]["status"] == "ok"
    assert rows["torch SGD fused"]["error"] == "ValueError: not this one"


def test_each_backend_is_a_row(tmp_path: Path) -> None:
    _, _, rows = run(tmp_path, "AdamW", "--compile", "eager,triton", "--peers", "none")
    assert list(rows) == ["AdamW [eager]", "AdamW [triton]"]
    assert rows["AdamW [triton]"]["kwargs"]["compile"] == "triton"
    with pytest.raises(OptionError, match="no option 'compile'"):
        from_entries([Entry("x", "torch.optim:SGD")], ["eager"])


def test_gradients_stay_in_windows_and_move_in_moving_steps(tmp_path: Path) -> None:
    run(tmp_path, "bench_local:Recorder", "--peers", "none", "--windows", "2", "--optimizer-args", "lr=0.1")
    log = sys.modules["bench_local"].Recorder.log  # first step, 3 windows of 2, 3 still, 3 moving, 1 for the peak
    assert len(set(log[:10])) == 1
    assert [pointer == log[0] for pointer in log[10:13]] == [False, True, False]


def test_everybody_goes_first_in_turn() -> None:
    subjects: list[Any] = [argparse.Namespace(row=row(name)) for name in "abc"]
    subjects[1].row.fail(ValueError("x"))
    orders = ["".join(s.row.label for s in measure._turns(subjects, turn)) for turn in range(3)]
    assert orders == ["ac", "ca", "ac"]
    assert measure._turns([], 1) == []


def test_contenders_that_do_not_fit_together_run_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 3000)
    status, _, rows = run(tmp_path, "AdamW")
    assert status == 0
    assert all("on its own" in r["notes"][0] and len(r["windows_ms"]) == 2 for r in rows.values())


def test_peers_get_the_same_hyperparameters() -> None:
    [ours] = from_entries([Entry("mine", "AdamW", {"lr": 0.5, "caution": True})], [])
    found, notes = peers.find_peers(["torch"], [ours, ours])
    assert [one.label for one in found] == ["torch AdamW fused", "torch AdamW foreach"] and not notes
    assert found[0].kwargs == {"lr": 0.5, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "fused": True}
    with pytest.raises(OptionError, match="no peer is named 'keras'"):
        peers.find_peers(["keras"], [ours])


def test_libraries_that_may_not_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "heavyball", None)  # what importing an absent module meets
    monkeypatch.delitem(sys.modules, "flashoptim", raising=False)
    (tmp_path / "flashoptim.py").write_text("import torch\nclass FlashAdamW(torch.optim.AdamW): pass\n")
    ours = from_entries([Entry("AdamW", "AdamW"), Entry("SGD", "SGD")], [])
    found, notes = peers.find_peers(["heavyball", "flashoptim"], ours)
    assert [one.label for one in found] == ["FlashOptim FlashAdamW"]
    assert "heavyball is skipped" in notes[0]
    assert notes[1] == "flashoptim is skipped for SGD: it has no such optimizer"
    cls = found[0].load()
    assert found[0].arguments(cls, PRECISIONS["fp32"])["master_weight_bits"] is None
    assert "master_weight_bits" not in found[0].arguments(cls, PRECISIONS["bf16"])


def test_heavyball_takes_part_where_it_compiles_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "heavyball", raising=False)
    source = (
        "import torch\nclass SGD(torch.optim.SGD):\n  def __init__(self, params, lr, **kwargs): assert kwargs == {}, kwargs\n"
    )
    (tmp_path / "heavyball.py").write_text(source)
    status, content, _ = run(tmp_path, "SGD", "--peers", "heavyball", "--shapes", "tiny,square")
    labels = [(r["shapes"], r["label"]) for r in content["rows"]]
    assert labels == [("tiny", "SGD"), ("square", "SGD"), ("square", "HeavyBall SGD")]
    assert "{'consume_grad': False}" in content["rows"][2]["error"], "its gradients must survive a step"
    assert status == 0


def test_any_class_can_be_named() -> None:
    assert find("hb_adam.adamw:AdamW") is find("AdamW") is find("hb_adam:AdamW")
    with pytest.raises(UnknownOptimizerError, match="neither registered nor importable"):
        find("hb_adam.adamw:Adamw")
    with pytest.raises(UnknownOptimizerError):
        find("Adamantium")


def test_state_is_counted_by_storage() -> None:
    class Quantised:
        def __init__(self) -> None:
            self.codes, self.scale, self.me = torch.zeros(7, dtype=torch.int8), torch.zeros(1), self

    p, rows = nn.Parameter(torch.zeros(5)), torch.zeros(4, 5)
    optimizer = torch.optim.SGD([p])
    optimizer.state[p] = {"a": rows[0], "b": [rows[1], {"c": rows}], "q": Quantised(), "z": p.detach(), "n": 3, "f": print}
    assert memory.state_bytes(optimizer) == 4 * 20 + 7 + 4


def test_the_check_sees_a_wrong_rule() -> None:
    [ours] = from_entries([Entry("AdamW", "AdamW", {"storage_dtype": "bfloat16", "compile": "inductor"})], [])
    cls = ours.load()
    assert accuracy.reference_arguments(cls, ours.kwargs) == {"compile": "eager", "consume_grad": False}
    wrong = Contender("wrong", "AdamW", "torch", "torch.optim:AdamW", {"lr": 0.0025, "betas": (0.8, 0.99)})
    right = Contender("right", "AdamW", "torch", "torch.optim:AdamW", {"lr": 0.0025, "betas": (0.9, 0.99), "weight_decay": 0.0})
    rows = [row("wrong"), row("right")]
    accuracy.check(zip([wrong, right], rows, strict=True), [ours], SMALL, PRECISIONS["fp32"], CPU, seed=0)
    assert rows[0].check and rows[1].check
    assert rows[0].check["displacement"] > 1e-3
    assert rows[1].check["displacement"] < 1e-5


def test_errors_are_relative_to_the_norm() -> None:
    def tensors(*values: float) -> list[Tensor]:
        return [torch.tensor([v], dtype=torch.float64) for v in values]

    found = accuracy.errors(tensors(3.0, 4.5), tensors(3.0, 4.0), tensors(0.0, 3.0))
    assert found == pytest.approx({"parameters": 0.1, "displacement": 0.5 / 10**0.5})
    assert accuracy.errors(tensors(1.0), tensors(1.0), tensors(1.0))["displacement"] == 0
    assert accuracy.errors(tensors(2.0), tensors(1.0), tensors(1.0))["displacement"] == float("inf")


def test_a_class_that_is_none_of_hbcore_s_is_checked_against_itself(tmp_path: Path) -> None:
    status, _, rows = run(tmp_path, "torch.optim:Adagrad", "--check")
    assert status == 0
    assert len(rows) == 3 and all(r["check"]["parameters"] < 1e-6 for r in rows.values())


def test_a_table_that_a_terminal_cannot_hold_is_plain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    for columns, framed in (("200", True), ("20", False)):
        monkeypatch.setenv("COLUMNS", columns)
        report.show([row(windows=[1.0], error="[red]x")], rich=True)
        printed = capsys.readouterr().out
        assert ("┃" in printed) is framed
        assert "window ms" in printed and "failed: [red]x" in printed


@pytest.mark.broad  # processes that import torch
def test_the_first_step_is_timed_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    [ours] = from_entries([Entry("AdamW", "hb_adam.adamw:AdamW", {"betas": (0.9, 0.95)})], [])
    found = first_step.measure_first_step(ours, "bench_local:model", PRECISIONS["bf16"], "cpu", threads=1, timeout=120)
    assert list(found) == ["cold", "warm"]
    for result in found.values():
        parts = [result.pop(f"{part}_seconds") for part in ("import", "constructor", "step")]
        assert min(parts) > 0 and result["seconds"] == pytest.approx(sum(parts))
        assert result["torch_seconds"] > 0


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import time; time.sleep(60)", "timed out after 1 s"),
        ("import sys; sys.exit('no licence')", "exit status 1: no licence"),
        ("print('chatter'); print('{\"seconds\": 2.5}')", None),
    ],
)
def test_a_process_that_does_not_answer(code: str, message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda words, **more: original([sys.executable, "-S", "-c", code], **more))
    found = first_step._process({}, {}, timeout=1 if "sleep" in code else 60)
    assert found == ({"seconds": 2.5} if message is None else {"error": message})


def test_first_steps_reach_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"cold": {"seconds": 2.0}, "warm": {"error": "out of luck"}}
    monkeypatch.setattr(command, "measure_first_step", lambda *_, **__: answer)
    _, _, rows = run(tmp_path, "AdamW", "--first-step", "--peers", "none")
    assert rows["AdamW"]["summary"]["first_step_cold_seconds"] == 2.0
    assert rows["AdamW"]["summary"]["first_step_warm_seconds"] is None
    assert "first step, warm: out of luck" in rows["AdamW"]["notes"]


def test_summaries() -> None:
    one = row(windows=[1.0, 2.0, 3.0, 4.0, 100.0], state_bytes=2 * PARAMETERS, traffic_bytes=6000, parameters=PARAMETERS)
    one.floor_at(4e6)
    summary = one.summary()
    assert (summary["window_ms"], summary["floor_fraction"], summary["state_bytes_per_param"]) == (3.0, 0.5, 2.0)
    assert summary["still_ms"] is None and summary["peak_bytes_per_param"] is None
    assert deciles([0.0, 10.0]) == (1.0, 9.0)
    assert deciles([5.0]) == (5.0, 5.0) and deciles([]) == (None, None)


def test_the_baseline_is_torch_s_fastest_kind() -> None:
    ours, foreach, fused = row("ours", windows=[3]), row("foreach", "torch", [2]), row("fused", "torch", [6])
    fused.kwargs["fused"] = True
    assert baseline([ours, foreach, fused]) is fused
    assert baseline([ours, foreach, row("failed", "torch")]) is foreach
    assert baseline([row("failed"), ours]) is ours
    assert baseline([row("failed")]) is None
    lines = report.table([ours, foreach, fused, row("failed", "torch")])
    column = lines[0].index("x torch")
    assert [line[column] for line in lines[1:]] == ["0.50", "0.33", "1.00", "-"]
    assert "host ms" not in lines[0], "a column without figures"


def test_the_chart_cuts_bars_that_would_flatten_the_others(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    base, slow = row("base", "torch", [1.0]), row("slow", windows=[10.0])
    looks = chart._colours([base, slow])
    assert chart._bar(axes, 0, base, base, looks["base"]) == 1.0
    assert chart._bar(axes, 1, slow, base, looks["slow"]) < 2 * chart.TALLEST
    assert [patch.get_height() for patch in axes.patches] == [1.0, chart.TALLEST]
    assert [text.get_text() for text in axes.texts] == ["1.000", "10.00\n(10.0x)"]
    chart.draw([row("failed")], "", "", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_without_matplotlib_the_numbers_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, content, _ = run(tmp_path, "AdamW", "--peers", "none")
    assert status == 0 and len(content["rows"]) == 1
    assert "matplotlib is not installed" in capsys.readouterr().err


def test_the_file_holds_plain_json(tmp_path: Path) -> None:
    one = row(check={"parameters": float("inf"), "displacement": float("nan")}, kwargs={"dtype": torch.float32, 1: (2,)})
    report.write_json(report.document([one]), tmp_path / "bench.json")
    [read] = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert read["check"] == {"parameters": None, "displacement": None}
    assert read["kwargs"] == {"dtype": "torch.float32", "1": [2]}
    assert [path.name for path in tmp_path.glob("bench.*")] == ["bench.json"]


@pytest.mark.gpu
def test_on_a_gpu_host_time_peak_and_launches_are_known(tmp_path: Path) -> None:
    status = bench.run(parse("AdamW", "--quick", "--device", "cuda", "--shapes", "tiny", "--out", str(tmp_path)))
    [ours, *_] = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert status == 0
    assert len(ours["host_ms"]) == 3 and ours["host_ms"][0] <= ours["moving_ms"][0]
    assert ours["peak_bytes"] is not None and ours["launches"] >= 1
