"""Blocks that are regions of a parameter: how they are cut, what may be cut, and that each trains as if it were alone."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from core.kit import distance, gradients, parameters, run, same
from core.rules import matrix, stepped

from hb_soap import SOAP
from hbcore.api import grid_view
from hbcore.errors import RuleError
from hbcore.rules.contract import blocks_of
from hbcore.rules.views import Block, covers

SIZES = {
    "vector": ((12,), 4, [(4,)] * 3),
    "ragged vector": ((10,), 4, [(4,), (4,), (2,)]),
    "exact": ((8, 4), 4, [(4, 4)] * 2),
    "ragged": ((6, 5), 4, [(4, 4), (4, 1), (2, 4), (2, 1)]),
    "one side": ((3, 9), 4, [(3, 4), (3, 4), (3, 1)]),
    "cube": ((4, 4, 4), 2, [(2, 2, 2)] * 8),
    "ragged cube": ((3, 2, 5), 2, [(2, 2, 2), (2, 2, 2), (2, 2, 1), (1, 2, 2), (1, 2, 2), (1, 2, 1)]),
    "elements": ((2, 3), 1, [(1, 1)] * 6),
    "of four dimensions": ((3, 2, 2, 3), 2, [(2, 2, 2, 2), (2, 2, 2, 1), (1, 2, 2, 2), (1, 2, 2, 1)]),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_grid_has_every_element_once(name):
    shape, size, shapes = SIZES[name]
    blocks = grid_view(shape, size, False)
    assert [b.shape for b in blocks] == shapes
    places = torch.arange(math.prod(shape)).view(shape)
    seen = np.concatenate([b.of(places).reshape(-1).numpy() for b in blocks])
    assert sorted(seen) == list(range(math.prod(shape)))
    for b in blocks:
        assert b.of(places).shape == (1, *b.shape) and b.numel == math.prod(b.shape)
        assert b.start == b.of(places).flatten()[0]
        assert b.of(places).untyped_storage().data_ptr() == places.untyped_storage().data_ptr()
    assert covers(blocks, shape)


@pytest.mark.parametrize("shape", [(4, 3), (4,), (), (2, 2, 2)], ids=str)
def test_what_is_small_enough_is_one_run(shape):
    assert grid_view(shape, 4, False) == (Block(0, 1, shape),)


@pytest.mark.parametrize(
    ("merge_dims", "shapes"), [(True, [(4, 4), (1, 4), (4, 2), (1, 2)]), (6, [(4, 4), (4, 2), (1, 4), (1, 2)])], ids=str
)
def test_dimensions_are_merged_before_they_are_cut(merge_dims, shapes):
    blocks = grid_view((5, 3, 2), 4, merge_dims)
    assert sorted(b.shape for b in blocks) == sorted(shapes) and {b.whole for b in blocks} == {(5, 6)}
    assert covers(blocks, (5, 3, 2))


def test_many_blocks_are_looked_at_in_no_time():
    assert covers(grid_view((4096, 4096), 32), (4096, 4096))  # comparing all pairs would take a minute


def region(corner, shape, whole=(4, 4)):
    return Block(corner[0] * whole[1] + corner[1], 1, shape, whole, corner)


HALVES = (region((0, 0), (2, 4)), region((2, 0), (2, 4)))
COVERED = {
    "halves": HALVES,
    "in another order": HALVES[::-1],
    "a wheel": (
        region((0, 0), (1, 3)), region((0, 3), (3, 1)), region((3, 1), (1, 3)), region((1, 0), (3, 1)), region((1, 1), (2, 2)),
    ),
    "the whole": (region((0, 0), (4, 4)),),
    "another view of it": (region((0, 0), (2, 4), (2, 8)), region((0, 4), (2, 4), (2, 8))),
    "runs": (Block(0, 2, (2, 2)), Block(8, 1, (2, 4))),
}  # fmt: skip
REFUSED = {
    "a gap": HALVES[:1],
    "a gap in the middle": (region((0, 0), (2, 3)), HALVES[1]),
    "an overlap": (*HALVES, region((1, 1), (1, 1))),
    "an overlap that makes up for a gap": (HALVES[0], region((1, 0), (2, 4))),
    "twice the same": (HALVES[0], HALVES[0]),
    "outside": (HALVES[0], region((3, 0), (2, 4))),
    "before the first": (HALVES[1], region((-1, 0), (2, 4)), region((1, 0), (1, 4))),
    "of a part": (region((0, 0), (2, 4), (4, 8)), region((2, 0), (2, 4), (4, 8))),
    "of another size": (region((0, 0), (4, 8), (4, 8)),),
    "two views": (HALVES[0], region((1, 0), (1, 8), (2, 8))),
    "two views whose places fit": (HALVES[0], HALVES[1]._replace(whole=(8, 2))),
    "a region and a run": (HALVES[0], Block(8, 1, (2, 4))),
    "a run and a region": (Block(0, 1, (2, 4)), HALVES[1]),
    "several in a row": (HALVES[0]._replace(batch=2), HALVES[1]),
    "fewer dimensions": (HALVES[0], HALVES[1]._replace(shape=(8,))),
    "more dimensions": (HALVES[0], HALVES[1]._replace(shape=(2, 4, 1))),
    "fewer places": (HALVES[0], HALVES[1]._replace(corner=(2,))),
    "a gap between runs": (Block(0, 1, (2, 2)), Block(8, 1, (2, 4))),
    "too many runs": (Block(0, 3, (2, 4)),),
    "nothing": (),
}


@pytest.mark.parametrize("name", COVERED)
def test_blocks_that_are_a_parameter(name):
    assert covers(COVERED[name], (4, 4))


@pytest.mark.parametrize("name", REFUSED)
def test_blocks_that_are_not_are_refused_by_name(name):
    assert not covers(REFUSED[name], (4, 4))
    rule = matrix(blocks=lambda self, shape: REFUSED[name])()
    with pytest.raises(RuleError, match=r"'toy' .ToyRule\.blocks. cuts shape \(4, 4\)"):
        blocks_of(rule, torch.Size((4, 4)))


CUT = {
    "ragged": ((6, 10), {}),
    "one side": ((3, 9), {}),
    "three": ((6, 3, 5), {"merge_dims": False}),
    "vector": ((10,), {"precondition_1d": True}),
    "staggered": ((8, 8), {"stagger": True}),
    "packed": ((6, 10), {"ecc": "bf16+8"}),
}
SPLIT = {"lr": 0.1, "split": True, "max_precond_dim": 4, "precondition_frequency": 2}


def slices(shape):
    """The places of the blocks, row by row."""
    return [b.of(torch.arange(math.prod(shape)).view(shape))[0] for b in grid_view(shape, 4, False)]


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("name", [name for name in CUT if name != "staggered"])  # whose turns depend on the name
def test_a_parameter_in_regions_trains_like_one_for_each_region(name, backend):
    shape, options = CUT[name]
    [whole] = params = parameters((shape,))
    parts = [torch.nn.Parameter(whole.detach().flatten()[places].clone()) for places in slices(shape)]
    one, many = (SOAP(p, compile=backend, **{**SPLIT, **options}) for p in (params, parts))
    for [g] in gradients(7, (shape,)):
        run(one, params, [[g]])
        run(many, parts, [[g.flatten()[places] for places in slices(shape)]])
    pieces = [whole.detach().flatten()[places] for places in slices(shape)]
    assert distance(pieces, parts) < 1e-6
    assert distance([whole], parameters((shape,))) > 0.1
    for k, part in enumerate(parts):
        for slot in ("exp_avg", "Q_0"):
            ours, theirs = (t.float().flatten() for t in (one.state[whole][f"{slot}@{k}"], many.state[part][slot]))
            assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("stop", [1, 4])
def test_it_resumes_where_it_was_saved(name, stop):
    shape, options = CUT[name]
    steps = list(gradients(8, (shape, (4, 4))))

    def made():
        params = parameters((shape, (4, 4)))
        return params, SOAP(params, compile="eager", **{**SPLIT, **options})

    straight, optimizer = made()
    run(optimizer, straight, steps)
    first, before = made()
    run(before, first, steps[:stop])
    resumed, after = made()
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    with torch.no_grad():
        for p, q in zip(resumed, first, strict=True):
            p.copy_(q)
    run(after, resumed, steps[stop:])
    assert same(resumed, straight)
    for p, q in zip(resumed, straight, strict=True):
        assert after.state[p].keys() == optimizer.state[q].keys()
        assert same(after.state[p].values(), optimizer.state[q].values())


def test_a_rule_sees_equal_regions_in_one_stack_and_writes_to_each():
    seen = []

    def update(self, u, s, c):
        seen.append((tuple(u.shape), c.param.amax((1, 2)).tolist()))
        return u * 0 + c.param.amax((1, 2), keepdim=True), {"m": s["m"] + u}

    made = matrix(update, needs=frozenset({"param"}), blocks=lambda self, shape: grid_view(shape, 2))
    p = torch.nn.Parameter(torch.arange(20.0).view(4, 5))
    optimizer = stepped(made, p, steps=1, lr=1.0, compile="eager")
    assert seen == [((4, 2, 2), [6.0, 8.0, 16.0, 18.0]), ((2, 2, 1), [9.0, 19.0])]
    largest = torch.tensor([[6.0, 8.0, 9.0], [16.0, 18.0, 19.0]]).repeat_interleave(2, 0)[:, [0, 0, 1, 1, 2]]
    assert torch.equal(p.detach(), torch.arange(20.0).view(4, 5) - largest)
    names = {"m@0", "m@1", "m@2", "m@3", "m@4", "m@5", "step"}
    assert set(optimizer.state[p]) == names


def test_strided_parameters_are_cut_in_logical_order():
    usual = parameters(((6, 10),))
    turned = [torch.nn.Parameter(usual[0].detach().T.contiguous().T)]
    for params in (usual, turned):
        run(SOAP(params, compile="eager", **SPLIT), params, gradients(5, ((6, 10),)))
    assert not turned[0].is_contiguous() and distance(turned, usual) < 1e-6
