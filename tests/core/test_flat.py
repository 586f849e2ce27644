"""Flat rules see all parameters of a group as one vector, whatever becomes of gradients, groups, state and ranks."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from core.kit import distance, gradients, normal, optimizer_of, parameters, run, same, values
from torch import Tensor

import hbcore
from hbcore.api import Domain, Optimizer, Parallel, Slot, Transform, hyper
from hbcore.errors import OptionError, ParameterError, RuleError
from hbcore.wrappers.gradient_release import hook_into_backward

SHAPES = ((5, 7), (13,), (2, 3, 4), (1,), ())


@dataclass(frozen=True)
class Centre(Transform):
    """Subtract the mean of the whole vector's running sum, and keep what is asked of a flat rule."""

    weight: float = hyper(1.0)
    name = "centre"
    domain = Domain.MATRIX
    flat = True

    def slots(self, param: Tensor) -> dict[str, Slot]:
        pair = Slot(torch.Size((*param.shape, 2)), exact=True)
        return {"pair": pair, "own": Slot(param.shape), "mean": Slot(torch.Size(()), shared=True)}

    def update(self, u: Tensor, s: Any, c: Any) -> tuple[Tensor, dict[str, Tensor]]:
        own = 0.5 * s["own"] + u
        memory = c.into("pair")
        pair = s["pair"].clone() if memory is None else memory
        pair[:, 0].copy_(own)
        pair[:, 1].add_(c.probe(u))
        mean = c.mean(own)
        return own - self.weight * mean + pair[:, 1], {"pair": pair, "own": own, "mean": 0.5 * s["mean"] + mean}


class Centred(Optimizer):
    """Gradient descent on what the rule makes of the gradients."""

    lr: float = 0.1
    weight: float = 1.0

    @staticmethod
    def chain(h):
        return (Centre(h.weight),)


def built(shapes=SHAPES, **options):
    params = parameters(shapes)
    return params, Centred(params, **options)


def expected_mean(held):
    return torch.cat([t.reshape(-1) for t in held]).mean()


def state_of(optimizer, params, name):
    return [optimizer.state[p][name] for p in params]


def steps(count, shapes=SHAPES, absent=lambda t, i: False):
    return [[None if absent(t, i) else g for i, g in enumerate(some)] for t, some in enumerate(gradients(count, shapes))]


def test_a_rule_is_given_the_parameters_end_to_end():
    params, optimizer = built()
    before = values(params)
    [grads] = steps(1)
    run(optimizer, params, [grads])
    mean = expected_mean(grads)
    for p, old, g in zip(params, before, grads, strict=True):
        state = optimizer.state[p]
        assert state["pair"].shape == (*p.shape, 2) and state["own"].shape == p.shape
        assert torch.equal(state["pair"][..., 0], g) and torch.equal(state["own"], g)
        assert torch.allclose(state["mean"], mean)
        assert torch.allclose(p.detach(), old - 0.1 * (g - mean + state["pair"][..., 1]), atol=1e-6)


def test_parameters_without_a_gradient_are_zeros_and_stay():
    params, optimizer = built()
    run(optimizer, params, steps(1))
    before, owns = values(params), [t.clone() for t in state_of(optimizer, params, "own")]
    [_, grads] = steps(2, absent=lambda t, i: t == 1 and i in (0, 3))
    run(optimizer, params, [grads])
    for i, (p, old, own, g) in enumerate(zip(params, before, owns, grads, strict=True)):
        assert torch.equal(p, old) == (i in (0, 3))
        assert torch.allclose(optimizer.state[p]["own"], 0.5 * own + (0 if g is None else g))
    first = expected_mean(owns)
    second = expected_mean([0.5 * own + (0 if g is None else g) for own, g in zip(owns, grads, strict=True)])
    assert torch.allclose(optimizer.state[params[0]]["mean"], 0.5 * first + second)
    assert float(optimizer.state[params[0]]["step"]) == 1


@pytest.mark.parametrize("options", [{}, {"ecc": "bf16+8"}, {"compile": "inductor"}, {"skip_nonfinite": True}], ids=str)
def test_ways_to_run_agree(options):
    first, second = built(compile="eager"), built(**options)
    for params, optimizer in (first, second):
        run(optimizer, params, steps(4))
    bound = 2e-2 if "ecc" in options else 1e-6
    assert distance(values(second[0]), values(first[0])) < bound


def test_each_group_and_dtype_has_a_vector_of_its_own():
    params = [*parameters(((4, 3), (5,), (6,))), *parameters(((7,),), torch.float64)]
    optimizer = Centred([{"params": params[:2], "weight": 0.5}, {"params": params[2:]}])
    grads = [normal(*p.shape, seed=i).to(p.dtype) for i, p in enumerate(params)]
    run(optimizer, params, [grads])
    means = [float(t) for t in state_of(optimizer, params, "mean")]
    assert means[0] == means[1] == pytest.approx(float(expected_mean(grads[:2])))
    assert means[2:] == pytest.approx([float(grads[2].mean()), float(grads[3].mean())])


def test_alone_each_parameter_has_a_vector_of_its_own():
    params, optimizer = built(multi_tensor=False)
    [grads] = steps(1)
    run(optimizer, params, [grads])
    for mean, g in zip(state_of(optimizer, params, "mean"), grads, strict=True):
        assert torch.allclose(mean, g.mean(), atol=1e-6)


def late(t, i):
    """The third parameter comes in the second step, the fourth and fifth are away at times."""
    return (i == 2 and t < 1) or (i == 3 and t in (2, 3)) or (i == 4 and t == 4)


def test_a_parameter_that_comes_late_is_a_vector_of_its_own():
    params, optimizer = built()
    run(optimizer, params, steps(2, absent=late))
    serials = [float(t) for t in state_of(optimizer, params, "centre.vector")]
    assert serials == [1, 1, 2, 1, 1]
    [_, grads] = steps(2)
    assert torch.allclose(optimizer.state[params[2]]["mean"], grads[2].mean(), atol=1e-6)


def through_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def by_state_dict(params, optimizer):
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = Centred(fresh)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    return fresh, resumed


def by_loading_into_one_that_stepped(params, optimizer):
    fresh, resumed = built()
    run(resumed, fresh, steps(2))
    for p, q in zip(fresh, params, strict=True):
        p.data.copy_(q)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    return fresh, resumed


def by_deepcopy(params, optimizer):
    return copy.deepcopy((params, optimizer))


def by_pickle(params, optimizer):
    return pickle.loads(pickle.dumps((params, optimizer)))


def by_replacing_one_tensor(params, optimizer):
    """As a wrapper does that brings one parameter's state back from elsewhere."""
    slots = optimizer.state[params[1]]
    slots["own"] = slots["own"].clone()
    return params, optimizer


def by_moving_all_memory(params, optimizer):
    for slots in optimizer.state.values():
        for name in slots:
            if name != "step":
                slots[name].data = slots[name].detach().clone()
    return params, optimizer


WAYS = [
    by_state_dict, by_loading_into_one_that_stepped, by_deepcopy, by_pickle, by_replacing_one_tensor, by_moving_all_memory,
]  # fmt: skip


@pytest.mark.parametrize("at", [1, 3, 4])
@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_bit_for_bit_in_the_same_vectors(way, at):
    """Also where a parameter of a vector has no gradient in the first step after it."""
    straight, optimizer = built()
    run(optimizer, straight, steps(6, absent=late))
    params, before = built()
    run(before, params, steps(6, absent=late)[:at])
    params, resumed = way(params, before)
    run(resumed, params, steps(6, absent=late)[at:])
    assert same(values(params), values(straight))
    for name in ("pair", "own", "mean", "centre.vector"):
        assert same(state_of(resumed, params, name), state_of(optimizer, straight, name))


def test_a_state_dict_has_every_parameter_s_own_memory():
    params, optimizer = built()
    run(optimizer, params, steps(1))
    for entry in optimizer.state_dict()["state"].values():
        for value in entry.values():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_a_parameter_that_is_taken_out_leaves_no_gap():
    params, optimizer = built()
    run(optimizer, params, steps(2))
    optimizer.param_groups[0]["params"].remove(params[0])
    own = [t.clone() for t in state_of(optimizer, params[1:], "own")]
    mean = optimizer.state[params[1]]["mean"].clone()
    [grads] = steps(1)
    params[0].grad = None
    run(optimizer, params[1:], [grads[1:]])
    now = expected_mean([0.5 * o + g for o, g in zip(own, grads[1:], strict=True)])
    assert torch.allclose(optimizer.state[params[1]]["mean"], 0.5 * mean + now)


def test_a_parameter_whose_state_was_deleted_starts_afresh_in_a_vector_of_its_own():
    params, optimizer = built()
    run(optimizer, params, steps(2))
    del optimizer.state[params[0]]
    [grads] = steps(1)
    run(optimizer, params, [grads])
    assert [float(t) for t in state_of(optimizer, params, "centre.vector")] == [2, 1, 1, 1, 1]
    assert torch.equal(optimizer.state[params[0]]["own"], grads[0])


def test_state_of_another_shape_is_an_error_that_names_the_parameter():
    params, optimizer = built()
    run(optimizer, params, steps(1))
    optimizer.state[params[0]]["pair"] = torch.zeros(5, 7, 3)
    with pytest.raises(ParameterError, match=r"'pair' of shape \(5, 7, 3\)"):
        run(optimizer, params, steps(1))


def test_a_step_that_is_skipped_changes_nothing_though_the_rule_writes_in_place():
    params, optimizer = built(skip_nonfinite=True)
    run(optimizer, params, steps(2))
    before = {name: [t.clone() for t in state_of(optimizer, params, name)] for name in ("pair", "own", "mean")}
    [grads] = steps(1)
    grads[1] = torch.full_like(grads[1], torch.inf)
    run(optimizer, params, [grads])
    for name, tensors in before.items():
        assert same(state_of(optimizer, params, name), tensors)


def test_a_slot_is_overwritten_where_it_lies():
    params, optimizer = built()
    run(optimizer, params, steps(1))
    seen = []
    real = Centre.update

    def watched(self, u, s, c):
        result = real(self, u, s, c)
        seen.append((result[1]["pair"].data_ptr(), s["pair"].data_ptr()))
        return result

    copied = []
    clone = Tensor.clone

    def watched_clone(self, *args, **kwargs):
        copied.append(tuple(self.shape))
        return clone(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Centre, "update", watched)
        patch.setattr(Tensor, "clone", watched_clone)
        run(optimizer, params, steps(1))
    assert seen[0][0] == seen[0][1] == optimizer.state[params[0]]["pair"].data_ptr()
    numel = sum(p.numel() for p in params)
    assert copied and (numel, 2) not in copied


@dataclass(frozen=True)
class Writes(Centre):
    """Writes to what it did not ask for."""

    def update(self, u: Tensor, s: Any, c: Any) -> tuple[Tensor, dict[str, Tensor]]:
        c.into("own")
        s["pair"].add_(1)
        return u, {}


def test_a_rule_may_write_to_nothing_else():
    params = parameters(SHAPES)
    with pytest.raises(RuleError, match="writes to a tensor that it was given"):
        run(optimizer_of(Writes)(params), params, steps(1))


@dataclass(frozen=True)
class Uneven(Centre):
    """Slots that depend on the parameter's size."""

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"pair": Slot(torch.Size((*param.shape, param.numel())), exact=True)}


@dataclass(frozen=True)
class Short(Centre):
    """A slot that is neither the parameter's nor shared."""

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"pair": Slot(torch.Size((3,)), exact=True)}


@dataclass(frozen=True)
class Primed(Centre):
    """Wants the first gradient for itself."""

    primes = True

    def prime(self, u: Tensor, s: Any, c: Any) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class Staggered(Centre):
    """Wants a turn for each row."""

    staggers = True


@dataclass(frozen=True)
class Elementwise(Centre):
    """No matrix rule."""

    domain = Domain.ELEMENTWISE


@dataclass(frozen=True)
class Derives(Centre):
    """A slot that is computed from the others."""

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {**super().slots(param), "mean": Slot(param.shape, derived=True)}

    def derive(self, s: Any, c: Any) -> dict[str, Tensor]:
        return {"mean": s["own"]}


@dataclass(frozen=True)
class Shares(Transform):
    """A shared slot in a rule that is not flat."""

    name = "shares"
    domain = Domain.MATRIX

    def blocks(self, shape: torch.Size) -> Any:
        return hbcore.api.matrix_view(shape)

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"mean": Slot(torch.Size(()), shared=True)}

    def update(self, u: Tensor, s: Any, c: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return u, {}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Uneven, "one vector is made of both"),
        (Short, "begins with its parameter's shape"),
        (Primed, "neither prime nor stagger"),
        (Staggered, "neither prime nor stagger"),
        (Elementwise, "neither prime nor stagger"),
        (Derives, "is derived, which slots of flat rules cannot be"),
        (Shares, "is shared, which slots of flat rules may be"),
    ],
)
def test_what_does_not_go_with_a_vector_is_refused_when_an_optimizer_is_made(rule, message):
    with pytest.raises(RuleError, match=message):
        optimizer_of(rule)(parameters(SHAPES))


def test_slots_that_depend_on_the_size_go_with_vectors_of_one_parameter():
    params = parameters(SHAPES)
    optimizer = optimizer_of(Uneven)(params, multi_tensor=False)
    state = optimizer.state_dict()["state"]
    assert [state[i]["pair"].shape for i, _ in enumerate(params)] == [(*p.shape, p.numel()) for p in params]


def test_a_branch_of_parallel_takes_no_flat_rule():
    with pytest.raises(RuleError, match="is flat"):
        Parallel(((Centre(),), ()))


def test_gradient_release_needs_vectors_of_one_parameter():
    params, optimizer = built()
    with pytest.raises(OptionError, match="whole model or group"):
        hook_into_backward(params, optimizer)
    params, optimizer = built(multi_tensor=False, consume_grad=True)
    plain, usual = built(multi_tensor=False)
    with hook_into_backward(params, optimizer):
        for t in range(3):
            sum((p * normal(*p.shape, seed=t).float()).sum() for p in params).backward()
            optimizer.step()
    run(usual, plain, [[normal(*p.shape, seed=t).float() for p in plain] for t in range(3)])
    assert distance(values(params), values(plain)) < 1e-6


@dataclass(frozen=True)
class Curved(Centre):
    """Follows the Hessian-vector products of its vector."""

    needs = frozenset({"hvp"})

    def update(self, u: Tensor, s: Any, c: Any) -> tuple[Tensor, dict[str, Tensor]]:
        pair = torch.stack([c.hvp, c.vector], 1)
        return u, {"pair": pair, "own": s["own"], "mean": s["mean"]}


def test_a_vectors_hessian_vector_products_are_those_of_its_parameters_end_to_end():
    params = [torch.nn.Parameter(p.detach().double()) for p in parameters(SHAPES)]
    optimizer = optimizer_of(Curved)(params)

    def closure():
        optimizer.zero_grad()
        loss = sum((k + 1) * p.square().sum() for k, p in enumerate(params[:-1])) / 2 + params[-1].sum() * params[0].sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    vectors = [optimizer.state[p]["pair"][..., 1] for p in params]
    for k, p in enumerate(params):
        product = (k + 1) * vectors[k] if k < len(params) - 1 else torch.zeros_like(p)
        product = product + (vectors[-1].sum() if k == 0 else 0) + (vectors[0].sum() if k == len(params) - 1 else 0)
        assert torch.allclose(optimizer.state[p]["pair"][..., 0], product, rtol=1e-12)
