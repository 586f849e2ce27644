"""The charts of ``docs/performance.md``: bars, drawn from ``benchmarks/results`` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from docs_site import drawing, results


class Bar(NamedTuple):
    """One bar: what it stands for, its length, and whether it is hbcore's."""

    label: str
    value: float
    own: bool


class Chart(NamedTuple):
    """A chart.

    Attributes:
        title: what the bars are, with their unit.
        files: the names of the files that they are from.
        bars: computes them.
    """

    title: str
    files: tuple[str, ...]
    bars: Callable[[], Iterable[Bar]]


def _windows(file: str, shapes: str, dtype: str = "fp32") -> list[tuple[str, bool, float]]:
    wanted = (file, results.SHAPES[shapes], dtype)
    return [(f.label, f.own, f.ms) for f in results.figures() if (f.file, f.shapes, f.dtype) == wanted]


def _against_fused() -> Iterable[Bar]:
    names = {"AdamW": "hbcore", "stack": "hbcore, three more options", "torch AdamW foreach": "torch, foreach"}
    for shapes in ("gpt2", "qwen", "square", "resnet50", "vit_b"):
        found = _windows("h200-adamw-fp32", shapes)
        [fused] = [ms for label, _, ms in found if label == "torch AdamW fused"]
        for label, own, ms in found:
            if label in names:
                yield Bar(f"{results.SHAPES[shapes]}: {names[label]}", ms / fused, own)


def _peers(dtype: str) -> Callable[[], Iterable[Bar]]:
    return lambda: [
        Bar("hbcore" if own else label, ms, own) for label, own, ms in _windows("h200-adamw-peers", "square", dtype)
    ]


def _family() -> Iterable[Bar]:
    bars = [Bar(label, ms, own) for label, own, ms in _windows("h100-hb_adam", "gpt2")]
    more = [Bar(label, ms, own) for label, own, ms in _windows("h100-hb_adam_more", "gpt2") if label != "AdamW"]
    return sorted(bars + more, key=lambda bar: bar.value)


def _muon() -> Iterable[Bar]:
    for shapes in ("qwen2d", "gpt2_2d"):
        for label, own, ms in _windows("h100-muon", shapes):
            yield Bar(f"{results.SHAPES[shapes]}: {'hbcore' if own else label}", ms, own)


def _preconditioned() -> Iterable[Bar]:
    names = {
        ("h200-soap-5", 'SOAP precondition_frequency=10 matmul_precision="split"'): "SOAP, a refresh every 10 steps",
        ("h200-soap-5", 'SOAP precondition_frequency=1 matmul_precision="split"'): "SOAP, a refresh every step",
        (
            "h200-soap",
            "soap.py:SOAP precondition_frequency=10 max_precond_dim=2048 lr=0.003",
        ): "SOAP's authors, a refresh every 10 steps",
        (
            "h200-psgd-8",
            'PSGDKron preconditioner_update_probability=0.03 matmul_precision="split"',
        ): "PSGDKron, a refresh at 3% of steps",
        (
            "h200-psgd-8",
            'PSGDKron preconditioner_update_probability=1.0 matmul_precision="split"',
        ): "PSGDKron, a refresh every step",
        (
            "h200-psgd",
            "kwns4.py:KWNS4 preconditioner_max_size=2048 preconditioner_max_skew=1e9",
        ): "psgd_torch's KWNS4, a refresh every step",
    }
    measured = {(f.file, f.label): f for f in results.figures()}
    return [Bar(shown, measured[key].ms, measured[key].own) for key, shown in names.items()]


def _compared() -> Iterable[Bar]:
    for run in results.load("cpu2-soap-compare")["runs"]:
        label = f"{run['label']}, lr {run['lr']:g}, {run['summary']['ms_per_iteration']:.0f} ms an iteration"
        yield Bar(label, run["summary"]["final_val_loss"], True)


def _compressed(what: str) -> Callable[[], Iterable[Bar]]:
    names = {
        "fp32": "float32",
        "fp32, ecc bf16+8": 'ecc="bf16+8"',
        "fp32, ecc int8": 'ecc="int8"',
        "bf16+8, ecc bf16+8": 'param_ecc="bf16+8", ecc="bf16+8"',
        "bf16+8, ecc int8": 'param_ecc="bf16+8", ecc="int8"',
        "torch fused fp32": "torch, float32, fused",
    }

    def bars() -> Iterable[Bar]:
        rows: dict[str, Any] = results.load("h200-compressed")["gpt2"]
        return [Bar(shown, rows[name][what], not name.startswith("torch")) for name, shown in names.items()]

    return bars


CHARTS = {
    "adamw": Chart("AdamW on an H200: time relative to torch's fused AdamW, which is 1", ("h200-adamw-fp32",), _against_fused),
    "peers-fp32": Chart("AdamW, 32 x 2048², float32, H200: ms a step", ("h200-adamw-peers",), _peers("fp32")),
    "peers-bf16": Chart("AdamW, 32 x 2048², bfloat16, H200: ms a step", ("h200-adamw-peers",), _peers("bf16")),
    "family": Chart("GPT-2 124M, float32, H100: ms a step", ("h100-hb_adam", "h100-hb_adam_more"), _family),
    "muon": Chart("Muon, float32, H100: ms a step", ("h100-muon",), _muon),
    "preconditioned": Chart(
        "GPT-2's hidden matrices, float32, H200: ms a step, in the mean",
        ("h200-soap", "h200-soap-5", "h200-psgd", "h200-psgd-8"),
        _preconditioned,
    ),
    "compare": Chart("Validation loss after 300 steps, two CPU cores", ("cpu2-soap-compare",), _compared),
    "compressed-time": Chart("AdamW on GPT-2 124M, H200: ms a step", ("h200-compressed",), _compressed("ms")),
    "compressed-bytes": Chart(
        "The same: bytes per parameter, of the parameter and the state", ("h200-compressed",), _compressed("bytes")
    ),
}
"""Name -> chart; a page has ``<!-- chart: NAME -->`` for it."""


def draw(name: str) -> str:
    """The chart as an SVG element, between its title and the names of its files.

    Raises:
        KeyError: there is no such chart.
    """
    chart = CHARTS[name]
    bars = list(chart.bars())
    with drawing.figure(6.8, 0.4 + 0.24 * len(bars)) as (shown, axes):
        colours = [drawing.FIRST if bar.own else drawing.THIRD for bar in bars]
        places = range(len(bars))
        drawn = axes.barh(places, [bar.value for bar in bars], color=colours, height=0.7)
        axes.bar_label(drawn, [f"{bar.value:.3g}" for bar in bars], padding=3)
        axes.set_yticks(places, [bar.label for bar in bars])
        axes.invert_yaxis()
        axes.spines["left"].set_visible(False)
        axes.tick_params(left=False)
        axes.margins(x=0.1)
        element = drawing.svg(shown, f"chart-{name}", chart.title)
    files = ", ".join(f"<code>benchmarks/results/{file}.json</code>" for file in chart.files)
    return f'<figure class="chart"><figcaption>{chart.title}</figcaption>\n{element}\n<p>{files}</p></figure>'
