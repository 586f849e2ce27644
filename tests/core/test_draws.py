"""Random numbers of elementwise rules: their distribution, and that nothing but seed, names, step and place decides them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from core.kit import distance, gradients, parameters, run, same, values
from torch import Tensor, nn

import hbcore
from hb_muon import Muon
from hbcore.api import Context, Domain, Extension, Optimizer, Parallel, Slot, State, Transform, hyper, zeros
from hbcore.errors import FallbackWarning, OptionError, RuleError
from hbcore.rules.noise import noise_key, normal_of, philox4x32, stochastic_round_bf16, stream_key, uniform_of, words

NUMBERS = 200_000


@dataclass(frozen=True)
class Langevin(Transform):
    r"""Stochastic gradient Langevin dynamics, Welling and Teh 2011: :math:`p - \frac{lr}{2} g + \sqrt{lr}\, n`."""

    lr: float = hyper(1.0, ge=0)
    name = "langevin"
    stage = "apply"
    owns_apply = True
    draws = 1

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return c.param - self.lr / 2 * u + self.lr.sqrt() * c.probe(u), {}


class SGLD(Optimizer):
    """Langevin dynamics."""

    lr: float = 1.0

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (Langevin(h.lr),)


@dataclass(frozen=True)
class Drawn(Transform):
    """Keeps what it draws, and leaves the update alone."""

    name = "drawn by me"
    draws = 3

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"first": Slot(param.shape, exact=True), "second": Slot(param.shape, exact=True), "probe": zeros(param)}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return u, {"first": c.noise(u), "second": c.noise(u), "probe": c.probe(u)}


class Draw(Extension):
    """Another optimizer, and what is drawn before its rules."""

    default_base = "SGD"

    @classmethod
    def chain(cls, h: Any) -> tuple[Transform, ...]:
        return (Drawn(), *super().chain(h))


def slots_of(optimizer: torch.optim.Optimizer, params: Any, *names: str) -> list[Tensor]:
    return [optimizer.state[p][name].detach().clone() for p in params for name in names or ("first", "second", "probe")]


def drawn(*names: str, steps: int = 1, shapes: Any = ((5, 7), (13,)), **options: Any) -> list[Tensor]:
    params = parameters(shapes)
    optimizer = Draw(params, **options)
    run(optimizer, params, gradients(steps, shapes))
    return slots_of(optimizer, params, *names)


def kolmogorov(sample: Tensor, cdf: Any) -> float:
    """The largest distance of the empirical distribution function from ``cdf``."""
    x, n = sample.flatten().double().sort().values, sample.numel()
    at, steps = cdf(x), torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((steps[1:] - at).max(), (at - steps[:-1]).max()))


FAR = math.sqrt(math.log(2 / 1e-9) / (2 * NUMBERS)) + 2.0**-24
"""Massart's bound (1990): a right sampler is farther than this once in 1e9 seeds; and a grid of 24 bits."""


def test_langevin_noise_is_standard_normal() -> None:
    """At a gradient of zero the parameter moves by the noise alone."""
    p = nn.Parameter(torch.zeros(NUMBERS))
    p.grad = torch.zeros_like(p)
    SGLD([p], lr=0.25).step()
    n = p.detach().double() / 0.5
    assert abs(float(n.mean())) < 6 / NUMBERS**0.5
    assert abs(float(n.var()) - 1) < 6 * (2 / NUMBERS) ** 0.5  # the variance of a square of a normal number is 2
    assert abs(float((n[1:] * n[:-1]).mean())) < 6 / NUMBERS**0.5
    assert kolmogorov(n, torch.special.ndtr) < FAR


def test_noise_is_uniform() -> None:
    first, second = drawn("first", "second", shapes=((NUMBERS,),))
    for u in (first.double(), second.double()):
        assert float(u.min()) >= 0 and float(u.max()) < 1
        assert abs(float(u.mean()) - 0.5) < 6 * (1 / 12 / NUMBERS) ** 0.5
        assert kolmogorov(u, lambda x: x) < FAR
    product = ((first.double() - 0.5) * (second.double() - 0.5)).mean()
    assert abs(float(product)) < 6 / 12 / NUMBERS**0.5


def test_normal_numbers_are_box_and_mullers() -> None:
    """In float64, from Philox's words; the ends of both uniform numbers included."""
    ends = torch.tensor([0, 1, 0x7FFFFF, 0x800000, 0x800001, 0xFFFFFF]) << 8
    a, b = (t.flatten() for t in torch.meshgrid(ends, ends, indexing="ij"))
    high, low, _, _ = philox4x32(5, torch.arange(10_000))
    assert torch.equal(words(5, torch.arange(10_000)), (high << 32) | low)
    a, b = torch.cat([a, high]), torch.cat([b, low])
    u, v = ((a >> 8).double() + 0.5) * 2.0**-24, (b >> 8).double() * 2.0**-24
    exact = (-2 * u.float().double().log()).sqrt() * (2 * math.pi * v).cos()  # one half more than a float32 holds
    assert float((normal_of((a << 32) | b).double() - exact).abs().max()) < 2e-6
    assert torch.equal(uniform_of((a << 32) | b), ((a >> 8).double() * 2.0**-24).float())


@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(d, marks=pytest.mark.broad) for d in (torch.bfloat16, torch.float64))], ids=str
)
@pytest.mark.parametrize("backend", ["inductor", "cpp", "triton"])
def test_backends_draw_the_same(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "inductor" and dtype != torch.float32:
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    results, shapes = [], ((5, 7), (13,), (), (90, 50))
    for how in ("eager", backend):
        params = parameters(shapes, dtype)
        optimizer = Draw(params, compile=how, stochastic_rounding=True, caution=True)
        run(optimizer, params, gradients(2, shapes, dtype))
        results.append((slots_of(optimizer, params, "first", "second"), slots_of(optimizer, params, "probe"), values(params)))
    assert optimizer.report.backend == backend and not optimizer.report.reasons
    assert same(results[1][0], results[0][0])
    assert distance(results[1][1], results[0][1]) < 1e-6
    assert distance(results[1][2], results[0][2]) < (1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_every_step_parameter_call_and_seed_has_its_own_numbers() -> None:
    kinds = [{}, {"steps": 2}, {"seed": 1}]
    every = [t for options in kinds for t in drawn("first", "second", shapes=((40,), (40,)), **options)]
    assert all(not torch.equal(a, b) for i, a in enumerate(every) for b in every[:i])
    assert same(drawn(), drawn()) and same(drawn(seed=3, steps=2), drawn(seed=3, steps=2))


def test_numbers_depend_on_the_parameters_name_and_not_on_its_place() -> None:
    params = parameters(((6,), (6,)))
    numbers = []
    for named in ([("a", params[0]), ("b", params[1])], [("b", params[1]), ("a", params[0])], [("a", params[0])]):
        optimizer = Draw(named)
        run(optimizer, [params[0]], [[torch.ones(6)]])
        numbers += slots_of(optimizer, [params[0]], "first")
    assert same(numbers[1:], numbers[:-1])


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = drawn()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert same(drawn(), a)


@pytest.mark.parametrize("options", [{}, {"ecc": "bf16+8", "stochastic_rounding": True}, {"multi_tensor": False}], ids=str)
def test_langevin_dynamics_resume_bit_for_bit(options: dict[str, Any]) -> None:
    straight, params, steps = parameters(), parameters(), list(gradients(6))
    run(SGLD(straight, lr=0.01, **options), straight, steps)
    optimizer = SGLD(params, lr=0.01, **options)
    run(optimizer, params, steps[:3])
    resumed = SGLD(params, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(resumed, params, steps[3:])
    assert same(params, straight)


@dataclass(frozen=True)
class Untraceable(Drawn):
    """Looks at a number, which no graph can."""

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return super().update(u * 1 if float(c.step) > 0 else u, s, c)


class Unfused(Extension):
    """The same draws by a rule that cannot be traced."""

    @classmethod
    def chain(cls, h: Any) -> tuple[Transform, ...]:
        return (Untraceable(), *super().chain(h))


def test_a_rule_that_cannot_be_fused_draws_the_same() -> None:
    params = parameters(((5, 7), (13,)))
    optimizer = Unfused.over("SGD")(params)
    with pytest.warns(FallbackWarning, match="cannot be fused"):
        run(optimizer, params, gradients(1, ((5, 7), (13,))))
    assert same(slots_of(optimizer, params), drawn())


@dataclass(frozen=True)
class Normalised(Transform):
    """Noise of the update's norm: what is drawn takes part in a reduction and in what follows it."""

    name = "normalised"
    domain = Domain.TENSOR
    draws = 1

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        n = c.probe(u)
        return u + n * (c.norm(u) / c.norm(n).clamp(min=1e-30)), {}


@dataclass(frozen=True)
class Other(Drawn):
    """A second rule that draws, with another name."""

    name = "other"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {f"other_{name}": slot for name, slot in super().slots(param).items()}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        u, new = super().update(u, s, c)
        return u, {f"other_{name}": value for name, value in new.items()}


def optimizer_of(*rules: Transform) -> type[Optimizer]:
    class Toy(Optimizer):
        lr: float = 0.1

        @staticmethod
        def chain(h: Any) -> tuple[Transform, ...]:
            return rules

    return Toy


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_noise_is_the_same_on_both_sides_of_a_reduction(backend: str) -> None:
    """The noise has the norm of the update, which it would not if a later pass drew anew."""
    p = nn.Parameter(torch.zeros(4000))
    p.grad = torch.zeros(4000)
    p.grad[0] = 3.0
    optimizer_of(Normalised())([p], lr=1.0, compile=backend).step()
    moved = -p.detach()
    moved[0] -= 3.0
    assert abs(float(moved.norm()) - 3.0) < 1e-5


def test_two_rules_draw_other_numbers_and_a_fork_counts_its_branches() -> None:
    params = parameters(((50,),))
    optimizer = optimizer_of(Drawn(), Other())(params)
    run(optimizer, params, [[torch.ones(50)]])
    state = optimizer.state[params[0]]
    assert not torch.equal(state["first"], state["other_first"])
    fork = Parallel(((Drawn(),), (Other(),)), merge=first_of)
    assert fork.draws == 6
    optimizer = optimizer_of(fork)(params)
    run(optimizer, params, [[torch.ones(50)]])
    state = [t for name, t in optimizer.state[params[0]].items() if name.endswith("first")]
    assert len(state) == 2 and not torch.equal(*state)


def first_of(updates: Any, c: Context) -> Tensor:
    return updates[0] + 0 * updates[1]


def test_rules_draw_beside_matrix_rules_on_complex_parameters_and_in_sparse_rows() -> None:
    params = parameters(((6, 4), (4,)))
    optimizer = Draw(params, base=Muon)
    run(optimizer, params, gradients(1, ((6, 4), (4,))))
    assert same(slots_of(optimizer, params), drawn(shapes=((6, 4), (4,))))
    z = nn.Parameter(torch.ones(5, dtype=torch.complex64))
    optimizer = Draw([z])
    run(optimizer, [z], [[torch.ones(5, dtype=torch.complex64)]])
    first = optimizer.state[z]["first"]
    kept = torch.view_as_real(first) if first.is_complex() else first
    assert len(kept.unique()) == 10
    table = nn.Embedding(6, 3, sparse=True)
    optimizer = Draw(table.parameters(), base="SparseAdam")
    table(torch.tensor([1, 4])).sum().backward()
    optimizer.step()
    first = optimizer.state[table.weight]["first"]
    assert len(first[[1, 4]].unique()) == 6 and not first[[0, 2, 3, 5]].any()


@dataclass(frozen=True)
class Greedy(Transform):
    """Draws twice and declares once."""

    name = "greedy"
    draws = 1

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return u + c.noise(u) + c.probe(u), {}


@dataclass(frozen=True)
class Silent(Greedy):
    name = "silent"
    draws = 0


@dataclass(frozen=True)
class Shaped(Transform):
    name = "shaped"
    draws = 1

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return u * c.noise(c.step), {}


@dataclass(frozen=True)
class Negative(Greedy):
    name = "negative"
    draws = -1


@dataclass(frozen=True)
class Global(Transform):
    name = "global"

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return u + torch.randn_like(u), {}


@pytest.mark.parametrize(
    ("rules", "options", "error", "words"),
    [
        ((Greedy(),), {}, RuleError, r"'greedy' \(Greedy\.update\).*draws = 1 says; declare `draws = 2`"),
        ((Silent(),), {}, RuleError, r"'silent' \(Silent\.update\).*draws = 0 says; declare `draws = 1`"),
        ((Shaped(),), {}, RuleError, r"'shaped'.*c\.noise with shape \(\)"),
        ((Negative(),), {}, RuleError, "draws = -1 is not supported; draws is a whole number, at least 0"),
        ((Normalised(), Normalised()), {}, RuleError, "two rules are called 'normalised' and would draw the same"),
        ((Normalised(),), {"capturable": True}, OptionError, "capturable=True is not supported by normalised"),
    ],
)
def test_draws_that_cannot_be_are_refused_before_anything_moves(
    rules: tuple[Transform, ...], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    params = parameters(((3,),))
    before = values(params)
    with pytest.raises(error, match=words):
        run(optimizer_of(*rules)(params, **options), params, [[torch.ones(3)]])
    assert same(params, before)


def test_torchs_own_random_numbers_are_named() -> None:
    params = parameters(((3,),))
    with pytest.warns(FallbackWarning, match="global generator; declare `draws = 1` and use c.noise or c.probe"):
        run(optimizer_of(Global())(params), params, [[torch.ones(3)]])


def test_stochastic_rounding_draws_by_names_and_step_alone() -> None:
    """A checkpoint goes on with the numbers that the run would have had, in later versions too: this is how they are drawn."""
    p = nn.Parameter(torch.linspace(-2, 2, 40).to(torch.bfloat16))
    before, grad = p.detach().float(), torch.linspace(0.1, 3, 40).to(torch.bfloat16)
    p.grad = grad.clone()
    hbcore.get("SGD")([("w", p)], lr=0.001, momentum=0.0, stochastic_rounding=True, seed=7, compile="eager").step()
    bits = torch.stack(philox4x32(noise_key(stream_key("7/w", "noise.param"), 1), torch.arange(10)), 1).flatten() & 0xFFFF
    assert torch.equal(p.detach(), stochastic_round_bf16(before - grad.float() * 0.001, bits))


def test_inputs_that_share_a_word_have_bits_of_their_own():
    """Slots that were rounded by the same bits would err in the same direction."""
    from hbcore.engine.graph.program import shared_words

    counts = {"noise.a": 8, "noise.b": 16, "noise.c": 8, "noise.d": 5, "noise.e": 16, "noise.f": 11}
    made = shared_words(counts)
    taken = [(bits.word, bit) for bits in made.values() for bit in range(bits.shift, bits.shift + bits.width)]
    assert len(set(taken)) == len(taken) == sum(counts.values()) and max(bit for _, bit in taken) < 32
    assert [made[name].word for name in counts] == ["noise.a"] * 3 + ["noise.d"] * 3 and len({w for w, _ in taken}) == 2


def test_rounding_to_float16_is_unbiased_and_keeps_what_is_exact():
    from hbcore.rules.noise import stochastic_round_fp16

    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    number = ~every.isnan()
    for bits in (0, 1, 0x1FFF, 0xFFFF):
        back = stochastic_round_fp16(every.float(), torch.full_like(every, bits & 0x7FFF, dtype=torch.int32) | (bits & 0x8000))
        assert torch.equal(back[number], every[number]) and bool(back[~number].isnan().all())
    dither = torch.arange(2**13, dtype=torch.int32)
    for x in (1.0001, -3.00017, 1e-3, -1e-6, 3.1e-8, -(2.0**-26), 65503.9, 6.1e-5):
        made = stochastic_round_fp16(torch.full((2**13,), x), dither).double()
        low, high = float(made.min()), float(made.max())
        exact = float(torch.tensor(x))
        step = max(2.0**-24, 2.0 ** (math.floor(math.log2(abs(exact))) - 10))
        assert low <= exact <= high and high - low <= step and abs(float(made.mean()) - exact) <= step * 2.0**-13
    beyond = torch.tensor([65504.1, 1e30, -7e4, float("inf"), -float("inf")])
    for bits in (0, 0x1FFF):
        made = stochastic_round_fp16(beyond, torch.full((5,), bits, dtype=torch.int32))
        assert made.tolist() == [65504.0, 65504.0, -65504.0, float("inf"), -float("inf")]
