"""Products at a chosen precision: their errors against float64, and how the option ``matmul_precision`` reaches a rule."""

from __future__ import annotations

import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from core.kit import gradients, normal, parameters, run, same
from core.rules import kept, matrix, parameter, stepped

from hb_soap import SOAP
from hbcore.errors import OptionError, RuleError
from hbcore.rules import halves
from hbcore.rules.parts import EXPONENTS, Layout, views
from hbcore.rules.products import Exact, Split, Weights
from hbcore.rules.split_product import DEPTH

KINDS = {"exact": Exact(), "split": Split()}


def scaled(*shape, seed=0):
    """Rows, and whole matrices, of sizes that differ by many orders of magnitude."""
    rows = torch.logspace(-9, 0, shape[1], dtype=torch.float64)[:, None]
    return normal(*shape, seed=seed) * rows * torch.logspace(-20, 15, shape[0], dtype=torch.float64)[:, None, None]


def low_rank(*shape, seed=0):
    """Gradients of rank 12 whose elements are about 1e-3."""
    return 1e-3 * normal(*shape[:2], 12, seed=seed) @ normal(shape[0], 12, shape[2], seed=seed + 1) / 12**0.5


CASES = {
    "random": (normal(3, 17, 23), normal(3, 23, 13, seed=1)),
    "one element": (normal(2, 1, 1), normal(2, 1, 1, seed=1)),
    "badly scaled": (scaled(4, 33, 19), normal(4, 19, 29, seed=1)),
    "both badly scaled": (scaled(4, 31, 19), scaled(4, 19, 31, seed=1).flip(0)),
    "rank 12 at 1e-3": (low_rank(2, 67, 41), low_rank(2, 41, 53, seed=5)),
    # deeper than what is summed at once
    "deep": (normal(2, 5, 2 * DEPTH + 7), normal(2, 2 * DEPTH + 7, 3, seed=1)),
    "as deep as one sum": (normal(1, 5, DEPTH), normal(1, DEPTH, 3, seed=1)),
    "denormals": (normal(2, 9, 7) * 1e-41, normal(2, 7, 11, seed=1) * 1e20),
    "the smallest normal numbers": (normal(2, 9, 7) * 2e-37, normal(2, 7, 11, seed=1)),
    "the largest": (normal(2, 9, 7).clamp(-1, 1) * 3e38, normal(2, 7, 11, seed=1) * 1e-10),
    "1e30 times 1e-30": (normal(2, 9, 7) * 1e30, normal(2, 7, 11, seed=1) * 1e-30),
}
VIEWS = {
    "contiguous": (False, False),
    "left transposed": (True, False),
    "right transposed": (False, True),
    "both transposed": (True, True),
}


def laid(x, transposed):
    """The same matrices in float32, perhaps as a transposed view."""
    x = x.float()
    return x.mT.contiguous().mT if transposed else x.contiguous()


def errors(found, wanted):
    """The norm of each matrix's error relative to its norm, in float64."""
    difference = found.double().numpy() - wanted
    return np.linalg.norm(difference, axis=(1, 2)) / np.linalg.norm(wanted, axis=(1, 2))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_as_exact_as_float32(kind, case, view):
    a, b = (laid(x, transposed) for x, transposed in zip(CASES[case], VIEWS[view], strict=True))
    found = KINDS[kind].matmul(a, b)
    assert found.dtype == torch.float32 and found.shape == (len(a), a.shape[1], b.shape[2])
    assert errors(found, a.double().numpy() @ b.double().numpy()).max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_multiply_rows_or_columns(kind, columns, dtype):
    a, b = normal(3, 7, 5).to(dtype), normal(3, 5, 4, seed=1).to(dtype)
    numbers = normal(3, 4 if columns else 7, seed=2).to(dtype)
    wanted = a.double() @ b.double() * (numbers[:, None, :] if columns else numbers[:, :, None])
    out = torch.empty(3, 7, 4, dtype=dtype)
    for found in (
        KINDS[kind].matmul(a, b, weights=Weights(numbers, columns)),
        KINDS[kind].matmul(a, b, out, Weights(numbers, columns)),
    ):
        assert found.dtype == dtype and off(found.double(), wanted) < 1e-6
    assert torch.equal(out, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_split_products_may_be_written_over_a_factor(view, dtype):
    a, b = (laid(normal(2, 6, 6, seed=i), transposed).to(dtype) for i, transposed in enumerate(VIEWS[view]))
    wanted = Split().matmul(a, b)
    for k in (0, 1):
        factors = [a.clone(), b.clone()]
        memory = factors[k] if factors[k].is_contiguous() else factors[k].mT  # the same memory, in the shape of the product
        assert Split().overwrites and torch.equal(Split().matmul(*factors, memory), wanted) and torch.equal(memory, wanted)


@pytest.mark.parametrize("decay", [0.0, 0.95])
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("case", [name for name in CASES if name not in ("the largest", "denormals", "1e30 times 1e-30")])
@pytest.mark.parametrize("kind", KINDS)
def test_an_average_is_as_exact_as_float32(kind, case, transposed, decay):
    x = laid(CASES[case][0], transposed)
    x = x / x.abs().amax((1, 2), keepdim=True)  # whose square float32 has
    mean = x @ x.mT + torch.eye(x.shape[1]) * 1e-3
    exact = x.double().numpy()
    wanted = decay * mean.double().numpy() + (1 - decay) * exact @ exact.swapaxes(1, 2)
    found = KINDS[kind].averaged(mean, x, decay)
    assert found.dtype == torch.float32
    assert errors(found, wanted).max() < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_zero_times_anything_is_zero_and_harms_no_other_matrix(kind):
    a, b = normal(3, 5, 7).float(), normal(3, 7, 4, seed=1).float()
    a[1] = 0
    found = KINDS[kind].matmul(a, b)
    assert torch.equal(found[1], torch.zeros(5, 4)) and torch.equal(found[[0, 2]], KINDS[kind].matmul(a[[0, 2]], b[[0, 2]]))
    assert not KINDS[kind].averaged(torch.zeros(3, 5, 5), a * 0, 0.5).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_own_matrix_alone(value):
    a, b = normal(2, 5, 7).float(), normal(2, 7, 4, seed=1).float()
    a[0, 2, 3] = value
    found = Split().matmul(a, b)
    assert not found[0].isfinite().all()
    assert torch.equal(found[1:], Split().matmul(a[1:], b[1:]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_pass_through_as_they_are(dtype):
    a, b = normal(2, 5, 7).to(dtype), normal(2, 7, 4, seed=1).to(dtype)
    mean = torch.ones(2, 5, 5, dtype=dtype)
    assert torch.equal(Split().matmul(a, b), torch.bmm(a, b))
    assert torch.equal(Split().averaged(mean, a, 0.9), Exact().averaged(mean, a, 0.9))
    assert Split().matmul(a, b).dtype == dtype


def test_two_parts_keep_the_bits_that_they_promise():
    x = scaled(3, 40, 30).float()
    both, s = halves.parts(x, "hl", 2)
    assert both.dtype == torch.float16 and both.isfinite().all() and s.shape == (3, 1, 1)
    assert torch.equal(s.log2(), s.log2().round())
    back = (both[:, :, :30].double() + both[:, :, 30:].double()) / s.double()
    largest = x.double().abs().amax((1, 2), keepdim=True)
    assert ((back - x.double()).abs() <= 2.0**-22 * x.double().abs() + 2.0**-37 * largest).all()


def interpreter():
    """The kernels' module, and the device that they run on here."""
    pytest.importorskip("triton")
    from hbcore.rules import products_kernel

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter, or a GPU")
    return products_kernel, torch.device("cpu" if interpreted else "cuda")


def off(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def uneven(*shape, seed=0):
    x = normal(*shape, seed=seed).float()
    if x.numel() > 5:
        x[0].view(-1)[:6] = torch.tensor([0.0, -0.0, 1e-42, -1e-38, 8191.9, 2.0**-14])
    return x


SHAPES = [((3, 37, 53), (3, 53, 20)), ((2, 70, 71), (2, 71, 5)), ((1, 1, 1), (1, 1, 1))]


def layouts(shape, low_first):
    """Both ways in which parts of matrices of a shape may lie."""
    return Layout(shape[2], low_first), Layout(shape[1] * shape[2], low_first)


def content(parts, shape):
    """The high and the low parts as they are told to lie in memory, and the scales."""
    return [t.cpu() for t in (*map(parts.view, views(shape, parts.layout, False)), parts.scales(shape[0]))]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("way", [0, 1])
@pytest.mark.parametrize(("one", "other"), SHAPES, ids=str)
def test_the_kernel_makes_the_same_parts_bit_for_bit(one, other, way, together):
    kernels, on = interpreter()
    stacks = uneven(*one), 1e-20 * uneven(*other, seed=1)
    chosen = layouts(one, True)[way], layouts(other, False)[1 - way]
    for found, x in zip(kernels.split([x.to(on) for x in stacks], chosen, together), stacks, strict=True):
        (both, scale), n = halves.parts(x, "hl", 1), x.shape[1]
        for part, wanted in zip(content(found, x.shape), (both[:, :n], both[:, n:], scale.flatten()), strict=True):
            assert torch.equal(part, wanted)
    [alone] = kernels.split([stacks[0].to(on)], chosen[:1])
    for part, wanted in zip(
        content(alone, one), content(kernels.split([x.to(on) for x in stacks], chosen)[0], one), strict=True
    ):
        assert torch.equal(part, wanted)


@pytest.mark.parametrize("low_first", [False, True])
def test_parts_lie_where_their_views_say(low_first):
    x = uneven(3, 5, 7)
    both, scale = halves.parts(x, "hl", 1)
    for layout in layouts(x.shape, low_first):
        stack = halves.Halved(x, [])
        halves.make([(stack, layout)])
        for turned in (stack, stack.mT):
            high, low, scales = turned.parts()
            wanted = (both[:, :5].mT, both[:, 5:].mT) if turned.turned else (both[:, :5], both[:, 5:])
            assert torch.equal(high, wanted[0]) and torch.equal(low, wanted[1]) and torch.equal(scales, scale.flatten())
            assert turned.made is stack.made and turned.made[0].layout == layout  # they are made once


@pytest.mark.parametrize("sizes", [(1.0, 1.0), (1e-30, 1e30), (1e-20, 1e-15), (1e38, 1e-38)], ids=str)
def test_the_kernel_takes_scales_away_whatever_they_are(sizes):
    kernels, on = interpreter()
    a, b = (size * normal(2, 20, 20, seed=i).float().clamp(-1, 1) for i, size in enumerate(sizes))
    made = kernels.split([a.to(on), b.to(on)], (Layout(20, True), Layout(400, False)), together=True)
    s, r = (parts.scales(2).cpu().double()[:, None, None] for parts in made)
    product = ((a.double() * s) @ (b.double() * r)).float().to(on)
    found = kernels.unscale(product, *made, torch.empty_like(product)).cpu().double()
    assert off(found, a.double() @ b.double()) < 1e-6


@pytest.mark.parametrize("of_columns", [False, True])
def test_the_kernel_weighs_what_it_takes_the_scales_from(of_columns, monkeypatch):
    kernels, on = interpreter()
    monkeypatch.setattr(kernels, "BLOCK", 16)
    a, b, weights = (
        normal(2, 7, 20).float(),
        normal(2, 20, 5, seed=1).float(),
        normal(2, 5 if of_columns else 7, seed=2).float(),
    )
    made = kernels.split([a.to(on), b.to(on)], (Layout(20, True), Layout(100, False)))
    s, r = (parts.scales(2).cpu().double()[:, None, None] for parts in made)
    product = ((a.double() * s) @ (b.double() * r)).float().to(on)
    plain = kernels.unscale(product, *made, torch.empty_like(product)).cpu()
    found = kernels.unscale(product, *made, torch.empty_like(product), weights.to(on), of_columns).cpu()
    assert torch.equal(found, plain * (weights[:, None, :] if of_columns else weights[:, :, None]))


SQUARES = {
    "one": (1, 1),
    "a tile and its rest": (19, 33),
    "three tiles": (40, 50),
    "as deep as one sum": (16, 64),
}


def laid_out(kind, n, k, sizes=(1.0, 1e-9)):
    """A stack to be squared by a kernel, in float64 and as the kernel takes it."""
    _, on = interpreter()
    x = uneven(2, n, k) * torch.tensor(sizes)[:, None, None]
    if kind == "columns":
        return x.double(), (x.mT.contiguous().mT.to(on),)
    if kind == "rows":
        return x.double(), (x.to(on),)
    both, s = halves.parts(x, "hl", 1)
    high, low = both[:, :n].to(on), both[:, n:].to(on)
    return x.double(), (high, low, s.flatten().to(on))


@pytest.mark.parametrize("kind", ["rows", "columns", "parts"])
@pytest.mark.parametrize("case", SQUARES)
def test_the_kernel_squares_and_averages_as_float64_does(monkeypatch, case, kind):
    from hbcore.rules import square_kernel

    monkeypatch.setattr(square_kernel, "TILE", 16)
    exact, x = laid_out(kind, *SQUARES[case])
    n = exact.shape[1]
    mean = normal(2, n, n, seed=1).float()
    mean = mean + mean.mT
    square = exact @ exact.mT
    top = EXPONENTS[0]
    given = dict(zip(("high", "low", "scales"), x, strict=False), top=top)
    assert off(square_kernel.squared(**given).cpu()[:1].double(), square[:1]) < 1e-6
    found = square_kernel.squared(**given, mean=mean.to(x[0].device), decay=0.75).cpu().double()
    assert off(found, 0.75 * mean.double() + 0.25 * square) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e25], ids=str)
@pytest.mark.parametrize("kind", ["exact", "split", "rows", "parts"])
def test_what_overflows_is_left_out_of_an_average(kind, value):
    x, mean = normal(2, 5, 7).float(), torch.eye(5).expand(2, 5, 5).contiguous()
    x[1, 2, 3] = value
    if kind in KINDS:
        found = KINDS[kind].averaged(mean, x, 0.75)
    else:
        from hbcore.rules import square_kernel

        kernels, on = interpreter()
        x = x.to(on)
        [made] = kernels.split([x], (Layout(35, False),))
        given = (x,) if kind == "rows" else (*map(made.view, views((2, 5, 7), made.layout, False)), made.scales(2))
        found = square_kernel.squared(*given, mean=mean.to(on), decay=0.75, top=EXPONENTS[0]).cpu()
        x = x.cpu()
    assert off(found[0].double(), 0.75 * mean[0].double() + 0.25 * x[0].double() @ x[0].double().mT) < 1e-6
    assert torch.equal(found[1, 2], 0.75 * mean[1, 2]) and found.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e25], ids=str)
@pytest.mark.parametrize("kind", ["exact", "split", "rows", "parts"])
def test_a_square_that_overflows_is_not_finite(kind, value):
    """Rules keep what they have where a product is not finite; zeros would look like an answer."""
    x = normal(2, 5, 7).float()
    x[1, 2, 3] = value
    if kind in KINDS:
        found = KINDS[kind].squared(x)
    else:
        from hbcore.rules import square_kernel

        kernels, on = interpreter()
        x = x.to(on)
        [made] = kernels.split([x], (Layout(35, False),))
        given = (x,) if kind == "rows" else (*map(made.view, views((2, 5, 7), made.layout, False)), made.scales(2))
        found = square_kernel.squared(*given, top=EXPONENTS[0]).cpu()
    assert found[0].isfinite().all() and not found[1, 2, 2].isfinite()


@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize(("one", "other"), [*SHAPES, ((2, 40, 33), (2, 33, 50))], ids=str)
def test_the_kernel_multiplies_float32_as_float64_does(monkeypatch, one, other, turned):
    from hbcore.rules import float32_kernel

    monkeypatch.setattr(float32_kernel, "ROWS", 16)
    monkeypatch.setattr(float32_kernel, "COLUMNS", 32)
    _, on = interpreter()
    a, b = (laid(uneven(*s, seed=i), t).to(on) for i, (s, t) in enumerate(zip((one, other), turned, strict=True)))
    assert off(float32_kernel.product(a, b).cpu().double(), a.cpu().double() @ b.cpu().double()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_factor_gives_the_same_products(kind):
    tool, x, q = KINDS[kind], normal(3, 5, 7).float(), normal(3, 7, 7, seed=1).float()
    made = tool.prepared(x)
    for found, wanted in (
        (tool.matmul(made, q), x.double() @ q.double()),
        (tool.matmul(q[:, :5, :5].mT, made), q[:, :5, :5].mT.double() @ x.double()),
        (tool.matmul(made.mT, q[:, :5]), x.mT.double() @ q[:, :5].double()),
        (tool.matmul(q, made.mT), q.double() @ x.mT.double()),
        (tool.matmul(made, made.mT), x.double() @ x.mT.double()),
        (tool.squared(made), x.double() @ x.mT.double()),
        (tool.squared(made.mT), x.mT.double() @ x.double()),
        (
            tool.averaged(torch.zeros(3, 35, 35), made.reshape(3, 1, 35).mT, 0.5),
            0.5 * x.view(3, 35, 1).double() @ x.view(3, 1, 35).double(),
        ),
    ):
        assert found.shape == wanted.shape and off(found.double(), wanted) < 1e-6


def escaped(**options):
    """How much of SOAP's steps lies outside the twelve directions that its gradients ever had, in terms of energy."""
    rows = normal(12, 40, seed=1)
    p = torch.nn.Parameter(torch.zeros(48, 40))
    optimizer = SOAP([p], lr=1.0, weight_decay=0.0, **options)
    run(optimizer, [p], ([(1e-4 * normal(48, 12, seed=10 + k) @ rows).float()] for k in range(8)))
    inside, moved = torch.linalg.qr(rows.T)[0], p.detach().double()
    return float((moved - moved @ inside @ inside.T).norm() ** 2 / moved.norm() ** 2)


@pytest.mark.parametrize("precision", ["ieee", "split"])
def test_steps_stay_in_the_row_space_of_gradients_of_low_rank(precision):
    assert escaped(matmul_precision=precision) < 1e-3


def test_eleven_bits_would_not_keep_them_there(monkeypatch):
    def only_high(x, order, dim):
        both, scale = parts(x, order, dim)
        kept = [p if o == "h" else torch.zeros_like(p) for p, o in zip(both.chunk(len(order), dim), order, strict=True)]
        return torch.cat(kept, dim), scale

    parts = halves.parts
    monkeypatch.setattr(halves, "parts", only_high)
    assert escaped(matmul_precision="split") > 0.1


CHOICES = {None: (Exact, "highest"), "ieee": (Exact, "highest"), "split": (Split, "highest"), "tf32": (Exact, "high")}


def watching(seen):
    """A rule that takes down how it would multiply."""

    def update(self, u, s, c):
        seen.append((type(c.products), torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return u, {"m": s["m"]}

    def refresh(self, stacks):
        seen.extend((type(c.products), torch.get_float32_matmul_precision(), False) for _, c in stacks)
        return [{} for _ in stacks]

    return matrix(update, refresh=refresh)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_the_option_decides_how_a_rule_multiplies(choice, autocast):
    seen, p = [], parameter(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        stepped(watching(seen), p, matmul_precision=choice)
    assert seen == [(*CHOICES[choice], False)] * 4


@pytest.mark.parametrize("choice", ["tf16", "", True, "IEEE"])
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(choice):
    with pytest.raises(OptionError, match=rf"matmul_precision={choice!r} is not one of ieee, split, tf32, or None"):
        SOAP(parameters(((4, 3),)), matmul_precision=choice)


@pytest.mark.parametrize("choice", ["ieee", "split"])
def test_autocast_changes_no_bit(choice):
    results = []
    for autocast in (False, True):
        params = parameters(((5, 4), (7, 6)))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            run(SOAP(params, lr=0.1, matmul_precision=choice), params, gradients(4, ((5, 4), (7, 6))))
        results.append(params)
    assert same(*results)


def newer():
    """Where torch has an ``fp32_precision``; nothing before 2.9."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return []
    return [torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]


@pytest.fixture
def settings():
    """How to read torch's settings of precision, which are reset afterwards."""

    def read():
        try:
            legacy = torch.get_float32_matmul_precision()
        except RuntimeError:  # it does not mix with the newer ones
            legacy = None
        return legacy, [place.fp32_precision for place in newer()]

    yield read
    for place in newer():
        place.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for place in newer():
        place.fp32_precision = "none"


SET = {
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "of CUDA": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "of a CPU": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "of everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.mark.parametrize("fails", [None, "update", "refresh"])
@pytest.mark.parametrize("choice", ["ieee", "tf32"])
@pytest.mark.parametrize("name", SET)
def test_torchs_own_settings_are_afterwards_as_they_were(settings, name, choice, fails):
    if name.startswith("of ") and not newer():
        pytest.skip("this torch has no fp32_precision")
    SET[name]()
    before = settings()

    def fail(*_):
        raise ValueError("odd")

    made = matrix(fail if fails == "update" else kept, refresh=fail if fails else lambda self, stacks: [{} for _ in stacks])
    with pytest.raises(RuleError, match="odd") if fails else nullcontext():
        stepped(made, parameter(4, 3), matmul_precision=choice)
    assert settings() == before
    if name == "of everything":  # what follows it goes on doing so
        torch.backends.fp32_precision = "ieee"
        assert settings()[1] == ["ieee"] * 3
