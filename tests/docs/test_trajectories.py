"""The pictures of paths show what optimizers do."""

from __future__ import annotations

import numpy
import pytest

import hbcore

pytest.importorskip("matplotlib")
from docs_site import catalogue, path_picture, trajectories


def entry(name: str) -> catalogue.Entry:
    return next(e for e in catalogue.entries() if e.name == name)


def walk(name: str) -> trajectories.Path:
    return trajectories.walk(entry(name).cls, entry(name).info.spec)


def gradient(point: numpy.ndarray) -> numpy.ndarray:
    x, y = point
    return numpy.array([-2 * (1 - x) - 40 * x * (y - x**2), 20 * (y - x**2)])


def adam(lr: float) -> numpy.ndarray:
    """Kingma and Ba 2015, Algorithm 1, in float64."""
    p, m, v = numpy.array(trajectories.STARTS[0]), numpy.zeros(2), numpy.zeros(2)
    seen = [p]
    for t in range(1, trajectories.STEPS + 1):
        g = gradient(p)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        p = p - lr * (m / (1 - 0.9**t)) / numpy.sqrt(v / (1 - 0.99**t))
        seen.append(p)
    return numpy.stack(seen)


def test_the_path_of_adam_is_adam_s_with_the_best_learning_rate():
    path = walk("AdamW")
    x, y = (paths := numpy.stack([adam(lr) for lr in trajectories.LEARNING_RATES])).transpose(2, 0, 1)
    values = (1 - x) ** 2 + 10 * (y - x**2) ** 2
    best = int(numpy.argmin(values[:, -trajectories.LAST :].mean(1)))
    assert path.lr == trajectories.LEARNING_RATES[best]
    assert path.points.shape == (trajectories.STEPS + 1, 1, 2)
    assert numpy.abs(path.points[:, 0].numpy() - paths[best]).max() < 1e-3
    assert path.values[-1].item() == pytest.approx(values[best, -1], abs=1e-3)


@pytest.mark.parametrize("name", ["Muon", "SFAdamW", "SparseAdam", "SAMWrapper", "HyperBallAdamW"])
def test_every_kind_has_a_path(name):
    path = walk(name)
    assert path.points.isfinite().all()
    assert (path.values[-1] < path.values[0]).all()
    two = name in ("Muon", "HyperBallAdamW")
    assert path.points.shape[1] == (2 if two else 1)
    words = path_picture.caption(entry(name).info.spec, path)
    assert ("2 x 2 matrix" in words) == two
    assert ("optimizer.eval()" in words) == (name == "SFAdamW")
    if name == "HyperBallAdamW":
        norms = path.points.flatten(1).norm(dim=1)
        assert (norms - norms[0]).abs().max() < 1e-4, "a matrix stays on the sphere that it starts on"


def test_a_picture_has_the_path_in_it():
    path = walk("AdamW")
    drawn = path_picture.draw("AdamW", path)
    assert drawn == path_picture.draw("AdamW", path)
    assert drawn.count("<use") > trajectories.STEPS
    assert f"learning rate is {path.lr:g}" in path_picture.caption(entry("AdamW").info.spec, path)


def test_every_optimizer_that_is_not_for_vectors_gets_a_matrix():
    for name in hbcore.list_optimizers():
        spec = hbcore.info(name).spec
        assert trajectories.rows(spec) == 2 or "matrix" not in spec.capabilities
