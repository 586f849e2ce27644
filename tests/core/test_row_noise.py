"""Random numbers for rows of stacks: Philox's, however they are made, and decided by key, step, draw and place alone."""

from __future__ import annotations

import math

import pytest
import torch
from core.rules import matrix, optimizer_with, parameter, stepped

from hbcore.api import Slot, zeros
from hbcore.engine.backends.cpp import philox as cpp
from hbcore.engine.backends.cpp.build import cpp_compiler
from hbcore.engine.stacks import stack as stack_module
from hbcore.errors import CompileError
from hbcore.rules import launching, row_noise
from hbcore.rules.noise import stream_key
from hbcore.rules.row_noise import bits, normal, uniform

KEYS = torch.tensor([3, -5, 2**62 + 77, 0, -(2**63)])
KINDS = {"bits": bits, "uniform": uniform, "normal": normal}
WHEN = [(0, 0), (7, 3), (2**31 + 5, 2**32 - 1)]
"""Steps and draws; the last do not fit in 31 bits."""
NEAR = 4e-7
"""How far normal numbers may be apart, relative to the larger of 1 and their pair's distance from 0."""


def philox(counter, key):
    """Philox-4x32-10 by Python's integers, from the paper (doi:10.1145/2063384.2063405), Section 3.3."""
    (l0, r0, l1, r1), (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * l0, 0xCD9E8D57 * l1
        l0, r0, l1, r1 = second >> 32 ^ r0 ^ k0, second % 2**32, first >> 32 ^ r1 ^ k1, first % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return l0, r0, l1, r1


def words(key, place, step, draw):
    call, key = place // 4, key % 2**64
    return philox((call % 2**32, call >> 32, step, draw), (key % 2**32, key >> 32))


def made(kind, numel, step, draw, fill=row_noise.fill, keys=KEYS):
    out = torch.full((len(keys), numel), -9, dtype=torch.int32 if kind == "bits" else torch.float32)
    fill(kind, keys, out, step, draw)
    return out


def apart(a, b):
    """The largest difference of normal numbers, relative to the larger of 1 and their pair's distance from 0."""
    a, b = (torch.nn.functional.pad(x, (0, x.shape[1] % 2)).unflatten(1, (-1, 2)).double() for x in (a, b))
    return float(((a - b).abs().amax(-1) / b.norm(dim=-1).clamp(min=1)).max())


def test_the_oracle_gives_the_known_answers():
    """From the test vectors of Random123, the authors' library."""
    most = 2**32 - 1
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((most,) * 4, (most,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert philox(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize(("step", "draw"), WHEN)
def test_numbers_are_philoxs_by_row_place_step_and_draw(step, draw):
    drawn, flat, pairs = (KINDS[kind](KEYS, 23, step, draw) for kind in ("bits", "uniform", "normal"))
    for row, key in enumerate(KEYS.tolist()):
        for place in range(23):
            four = words(key, place, step, draw)
            assert drawn[row, place] == four[place % 4] & 0xFFFF
            assert flat[row, place] == (four[place % 4] >> 8) * 2.0**-24
            u, v = four[place % 4 // 2 * 2 :][:2]
            radius = math.sqrt(-2 * math.log(((u >> 8) + 0.5) * 2.0**-24)) * (-1 if v >> 31 else 1)
            angle = 2 * math.pi * ((v % 2**23 + 0.5) * 2.0**-24 - 0.25)
            wanted = radius * (math.sin(angle) if place % 2 else math.cos(angle))
            assert abs(float(pairs[row, place]) - wanted) < 2e-6


@pytest.mark.parametrize("made_by", [row_noise.words, cpp.words])
def test_a_place_beyond_four_thousand_millions_has_a_call_of_its_own(made_by):
    first = 2**32 - 2
    found = made_by(KEYS, first, 4, 5, 6, torch.empty(5, 20, dtype=torch.int64))
    wanted = [[words(key, 4 * (first + i), 5, 6) for i in range(4)] for key in KEYS.tolist()]
    assert torch.equal(torch.stack(found, -1), torch.tensor(wanted))


@pytest.mark.skipif(cpp_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("numel", [1, 7, 4095, 4097, 140_000])
@pytest.mark.parametrize("kind", KINDS)
def test_generated_code_draws_the_same(kind, numel):
    assert cpp._function() is not None
    for step, draw in WHEN:
        assert torch.equal(KINDS[kind](KEYS, numel, step, draw, cpp.words), KINDS[kind](KEYS, numel, step, draw))


def test_without_a_compiler_torch_draws(monkeypatch):
    monkeypatch.setattr(cpp, "load", fails)
    cpp._function.cache_clear()
    assert torch.equal(normal(KEYS, 9, 5, 1, cpp.words), normal(KEYS, 9, 5, 1))
    cpp._function.cache_clear()


@pytest.mark.skipif(cpp_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("compile", "in_cpp"), [("cpp", True), ("eager", False)])
def test_rules_draw_in_what_their_step_is_in(compile, in_cpp, monkeypatch):
    calls = []
    monkeypatch.setattr(cpp, "words", lambda *given: (calls.append(given), row_noise.words(*given))[1])
    drawing = matrix(lambda self, u, s, c: (c.probe(u), {"m": s["m"]}))
    stepped(drawing, parameter(8, 8), compile=compile)
    assert bool(calls) == in_cpp


def fails(source):
    raise CompileError("there is no compiler")


@pytest.mark.parametrize("numel", [1, 2, 3, 4, 7, 2047, 2048, 2049, 4100])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_draws_the_same(kind, numel):
    pytest.importorskip("triton")
    from hbcore.rules import noise_kernel

    if not launching.INTERPRETED:
        pytest.skip("runs under Triton's interpreter; tests/gpu has the same for a device")
    for step, draw in WHEN:
        ours, theirs = made(kind, numel, step, draw, noise_kernel.fill), made(kind, numel, step, draw)
        assert apart(ours, theirs) < NEAR if kind == "normal" else torch.equal(ours, theirs)


def test_the_kernels_normal_numbers_are_near_in_the_tails():
    pytest.importorskip("triton")
    from hbcore.rules import noise_kernel

    if not launching.INTERPRETED:
        pytest.skip("runs under Triton's interpreter; tests/gpu has the same for a device")
    keys = torch.arange(4)
    ours, theirs = (made("normal", 2**15, 1, 1, fill, keys) for fill in (noise_kernel.fill, row_noise.fill))
    assert float(theirs.abs().max()) > 4 and apart(ours, theirs) < NEAR


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 5, 16, 33, 60])
def test_numbers_do_not_depend_on_how_many_are_made_at_once(kind, chunk, monkeypatch):
    whole = KINDS[kind](KEYS, 61, 3, 2)
    assert torch.equal(KINDS[kind](KEYS, 41, 3, 2), whole[:, :41])
    assert torch.equal(KINDS[kind](KEYS[[3, 1]], 61, 3, 2), whole[[3, 1]])
    monkeypatch.setattr(row_noise, "CHUNK", chunk)
    assert torch.equal(KINDS[kind](KEYS, 61, 3, 2), whole)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_there_may_be_nothing_to_draw(shape):
    for draw in KINDS.values():
        assert draw(torch.arange(shape[0]), shape[1], 1).shape == shape


def streams():
    """Uniform numbers that differ in one of row, purpose, step and draw from the first of them."""
    names = [("a", "w"), ("b", "w"), ("a", "v"), ("aw", ""), ("", "aw")]
    keys = torch.tensor([stream_key(*name) for name in names])
    return [*uniform(keys, 20_000, 1), uniform(keys[:1], 20_000, 2)[0], uniform(keys[:1], 20_000, 1, 1)[0]]


def test_other_names_steps_and_draws_give_other_numbers():
    rows = torch.stack(streams()).double() - 0.5
    products = rows @ rows.T / rows.shape[1]
    expected = torch.eye(len(rows), dtype=torch.float64) / 12
    assert float((products - expected).abs().max()) < 6 / 12 / rows.shape[1] ** 0.5


def test_their_distributions_are_right():
    """To six standard errors of each mean."""
    numel = 40_001
    u, x, b = (draw(torch.arange(25), numel, 1).double() for draw in (uniform, normal, bits))
    n = u.numel()
    assert float(u.min()) >= 0 and float(u.max()) < 1 and x.isfinite().all()
    assert (int(b.min()), int(b.max())) == (0, 2**16 - 1)
    for sample, moments in ((u, [1 / 2, 1 / 3, 1 / 4, 1 / 5]), (x, [0, 1, 0, 3]), (b / 2**16, [1 / 2, 1 / 3, 1 / 4, 1 / 5])):
        for k, moment in enumerate(moments, start=1):
            power = sample**k
            assert abs(float(power.mean()) - moment) < 6 * float(power.std()) / n**0.5 + 2.0**-17
    for lag in range(1, 9):  # numbers of one call, and of neighbouring ones
        assert abs(float((x[:, lag:] * x[:, :-lag]).mean())) < 6 / n**0.5
        squares = x.square() - 1
        assert abs(float((squares[:, lag:] * squares[:, :-lag]).mean())) < 6 * 2 / n**0.5


def drawing(**attributes):
    def update(self, u, s, c):
        return u, {"a": c.noise(u), "b": c.probe(u), "m": s["m"] + 2.0**-10}

    def slots(self, p):
        exact = Slot(p.shape, exact=True)
        return {"a": exact, "b": exact, "m": Slot(p.shape, 1.0, dtype=torch.bfloat16)}

    return matrix(update, slots, **attributes)


def test_no_key_is_made_after_the_first_step(monkeypatch):
    heard = []
    monkeypatch.setattr(stack_module, "stream_key", lambda name, what: heard.append((name, what)) or stream_key(name, what))
    params = [parameter(4, 3), parameter(4, 3), parameter(5, 2)]
    optimizer = stepped(drawing(), *params, steps=1)
    assert sorted(heard) == sorted((f"0/0.{i}/0.0", what) for i in range(3) for what in ("toy", "round.m"))
    heard.clear()
    for active in (params, params, params[1:], params):
        before = [int(optimizer.state[p]["step"]) for p in params]
        for p in active:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert sum(int(optimizer.state[p]["step"]) for p in params) == sum(before) + len(active)
    assert heard == []


def test_a_rule_draws_by_seed_parameter_rule_step_and_draw():
    params = [parameter(4, 3), parameter(4, 3)]
    optimizer = stepped(drawing(), *params, steps=3, seed=9)
    for i, p in enumerate(params):
        key = torch.tensor([stream_key(f"9/0.{i}/0.0", "toy")])
        assert torch.equal(optimizer.state[p]["a"], uniform(key, 12, 3, 1).view(4, 3))
        assert torch.equal(optimizer.state[p]["b"], normal(key, 12, 3, 2).view(4, 3))


def test_float64_draws_the_numbers_of_float32():
    results = []
    for dtype in (torch.float32, torch.float64):
        p = torch.nn.Parameter(torch.ones(4, 3, dtype=dtype))
        p.grad = torch.ones_like(p)
        rule = matrix(lambda self, u, s, c: (u, {"m": c.probe(u)}), lambda self, p: {"m": zeros(p)})
        optimizer = optimizer_with(lambda h, rule=rule: (rule(h.beta),))([p])
        optimizer.step()
        results.append(optimizer.state[p]["m"])
    assert results[1].dtype == torch.float64 and torch.equal(results[0].double(), results[1])


def test_a_kernel_is_compiled_once_for_all_counts_and_for_each_size(monkeypatch):
    asked, launched = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: launched.append(arguments)

    class Kernel:
        def warmup(self, *arguments, **meta):
            asked.append(arguments)
            return Compiled()

    monkeypatch.setattr(launching, "INTERPRETED", False)
    kernel, t = Kernel(), torch.empty(4)
    for counts, size in (((5, 7), 3), ((6, 1), 3), ((2**31 - 1, -(2**31)), 3), ((6, 2**31), 3), ((5, 7), 4)):
        launching.run(kernel, (1, 1, 1), (t,), numbers=(0.5,), counts=counts, sizes=(size,), constants=(1,))
    assert len(asked) == 3 and len(launched) == 5
    assert [(a[1], *a[4:]) for a in asked] == [(1.0, 3, 1), (1.0, 3, 1), (1.0, 4, 1)]
    assert [widths(a[2:4]) for a in asked] == [(32, 32), (32, 64), (32, 32)]
    assert launched[3][1:] == (0.5, 6, 2**31, 3, 1)


def widths(counts):
    return tuple(32 if -(2**31) <= count < 2**31 else 64 for count in counts)
