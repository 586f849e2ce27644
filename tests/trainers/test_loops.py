"""Loops of one's own: a compiled step, GradScaler, and a trainer that steps in backward."""

from __future__ import annotations

import pytest
import torch
from core.kit import distance
from rounding import drift
from trainers import jobs
from trainers.tiny import OPTIMIZERS, differing, smoke, weights

import hbcore

pytestmark = pytest.mark.usefixtures("one_thread")


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


@pytest.mark.parametrize("name", smoke("AdamW", "MuonAdamW"))
def test_a_compiled_train_step_does_what_a_plain_one_does(name):
    """The model and a function that calls ``step()`` are compiled, with a schedule around them; nothing is compiled anew."""
    from torch._dynamo.utils import counters

    def run(compiled):
        model = jobs.net()
        optimizer = hbcore.create(name, model, **OPTIMIZERS[name])
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        forward = torch.compile(model, backend="aot_eager") if compiled else model

        def train_step(x, y):
            loss = loss_of(forward, x, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        step = torch.compile(train_step, backend="aot_eager") if compiled else train_step
        graphs = []
        for x, y in jobs.batches(5):
            step(x, y)
            schedule.step()
            graphs.append(counters["stats"].get("unique_graphs"))
        return model, graphs

    torch._dynamo.reset()
    plain, _ = run(False)
    compiled, graphs = run(True)
    assert len(set(graphs[1:])) == 1 and graphs[0]
    assert distance(compiled.parameters(), plain.parameters()) < 1e-4


@pytest.mark.parametrize("name", smoke("AdamW", "SOAP"))
def test_grad_scaler_unscales_clips_skips_and_is_saved_with_the_optimizer(name):
    def run(halt):
        model, scaler = jobs.net(), torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        optimizer = hbcore.create(name, model, **OPTIMIZERS[name])
        for i, (x, y) in enumerate(jobs.batches(6)):
            if i == halt:
                saved = model.state_dict(), optimizer.state_dict(), scaler.state_dict()
                model, scaler = jobs.net(), torch.amp.GradScaler("cpu")
                optimizer = hbcore.create(name, model, **OPTIMIZERS[name])
                for target, content in zip((model, optimizer, scaler), saved, strict=True):
                    target.load_state_dict(content)
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, x, y)
            scaler.scale(loss).backward()
            if i == 2:
                model[0].bias.grad[0] = torch.nan
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            before = weights(model)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert bool(differing(before, weights(model))) == (i != 2)
        assert max(float(s["step"]) for s in optimizer.state.values()) == 5
        return weights(model)

    straight = run(halt=None)
    for halt in (1, 3):
        assert not differing(straight, run(halt))


class Released:
    """A trainer in which each parameter steps as soon as its gradient is there; it cannot accumulate."""

    def __init__(self, name, model):
        self.model, self.optimizer = model, hbcore.create(name, model, **OPTIMIZERS[name])
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.release = hbcore.hook_into_backward(model, self.optimizer)

    def fit(self, data):
        for x, y in data:
            loss_of(self.model, x, y).backward()
            assert all(p.grad is None for p in self.model.parameters())
            self.optimizer.step()
            self.schedule.step()

    def checkpoint(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "lr": self.schedule.state_dict()}

    def restore(self, saved):
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["lr"])


@pytest.mark.parametrize("name", smoke("AdamW", "SFAdamW"))
def test_a_trainer_that_steps_in_backward_resumes_bit_for_bit(name, tmp_path):
    data = list(jobs.batches(6))
    straight = Released(name, jobs.net())
    straight.fit(data[:3])
    torch.save(straight.checkpoint(), tmp_path / "saved.pt")
    straight.fit(data[3:])
    again = Released(name, jobs.net())
    again.restore(torch.load(tmp_path / "saved.pt", weights_only=True))
    again.fit(data[3:])
    assert not differing(weights(straight.model), weights(again.model))
    plain = Released(name, jobs.net())
    plain.release.remove()
    for x, y in data:
        loss_of(plain.model, x, y).backward()
        plain.optimizer.step()
        plain.schedule.step()
    assert distance(straight.model.parameters(), plain.model.parameters()) < 100 * drift(torch.float32, 6)
