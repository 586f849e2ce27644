"""torchtitan's container of optimizers, by its contract: one for each part of a model, saved flat and by name."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from trainers import jobs
from trainers.tiny import OPTIMIZERS, differing, smoke

import hbcore

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:torch.distributed:UserWarning")]

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Container(torch.optim.Optimizer, Stateful):
    """Steps all optimizers, and saves and loads them as one flat dict through torch.distributed.checkpoint."""

    def __init__(self, parts, make):
        self.parts, self.optimizers = parts, [make(part) for part in parts]
        super().__init__([p for part in parts for p in part.parameters()], {})  # for its hooks

    def __iter__(self):
        return iter(self.optimizers)

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self):
        pairs = zip(self.parts, self.optimizers, strict=True)
        return {k: v for part, optimizer in pairs for k, v in get_optimizer_state_dict(part, optimizer, options=FLAT).items()}

    def load_state_dict(self, state_dict):
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, optim_state_dict=state_dict, options=FLAT)


class Named(Container):
    """The same without torch's helpers: by the names in the groups, and with state that a step at rate 0 has made."""

    def state_dict(self):
        flat = {}
        for optimizer in self.optimizers:
            first_step(optimizer)
            saved = optimizer.state_dict()
            for group in saved["param_groups"]:
                for key, name in zip(group["params"], group["param_names"], strict=True):
                    flat.update({f"state.{name}.{slot}": value for slot, value in saved["state"][key].items()})
                    flat.update({f"param_groups.{name}.{k}": v for k, v in group.items() if not k.startswith("param")})
        return flat

    def load_state_dict(self, state_dict):
        for optimizer in self.optimizers:
            first_step(optimizer)
            own = optimizer.state_dict()
            state, groups = {}, []
            for group in own["param_groups"]:
                for key, name in zip(group["params"], group["param_names"], strict=True):
                    state[key] = {slot: state_dict[f"state.{name}.{slot}"] for slot in own["state"][key]}
                first = group["param_names"][0]
                numbers = {k: state_dict[f"param_groups.{first}.{k}"] for k in group if not k.startswith("param")}
                groups.append({"params": group["params"], **numbers})
            optimizer.load_state_dict({"state": state, "param_groups": groups})


def first_step(optimizer):
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad()


def parts():
    """Two stages of a pipeline: each has a part of the model's names."""
    whole = jobs.net()
    return [nn.ModuleDict({str(i): whole[i] for i in (0, 2)}), nn.ModuleDict({"4": whole[4]})]


def made(name, kind):
    def make(part):
        named = list(part.named_parameters())
        decayed = {"params": [(n, p) for n, p in named if p.ndim > 1], "weight_decay": 0.1}
        rest = {"params": [(n, p) for n, p in named if p.ndim < 2], "weight_decay": 0.0}
        return hbcore.get(name)([decayed, rest], **OPTIMIZERS[name])

    model = parts()
    return model, kind(model, make)


def train(model, container, data, rate=1.0):
    first, last = model
    for optimizer in container:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * rate
    for x, y in data:
        container.zero_grad()
        (last["4"](first["2"](first["0"](x).tanh()).tanh()) - y).square().mean().backward()
        container.step()


def weights(model):
    return {name: p.detach().clone() for part in model for name, p in part.named_parameters()}


@pytest.mark.parametrize("kind", [Container, Named])
@pytest.mark.parametrize("name", smoke("AdamW", "MuonAdamW", "SOAP"))
def test_a_flat_checkpoint_resumes_bit_for_bit(name, kind, tmp_path):
    data = list(jobs.batches(6))
    model, container = made(name, kind)
    train(model, container, data[:3], rate=0.5)
    saved = weights(model)
    dcp.save({"optimizer": container.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in container]
    train(model, container, data[3:])

    again, other = made(name, kind)
    for part in again:
        part.load_state_dict({n: w for n, w in saved.items() if n in part.state_dict()})
    flat = {"optimizer": other.state_dict()}
    assert not differing(weights(again), saved), "asking for the state moves nothing"
    dcp.load(flat, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(flat["optimizer"])
    assert [[group["lr"] for group in optimizer.param_groups] for optimizer in other] == rates
    train(again, other, data[3:])
    assert not differing(weights(model), weights(again))


@pytest.mark.parametrize("name", smoke("AdamW", "SFAdamW"))
def test_every_value_has_a_flat_key_with_its_parameters_name(name):
    model, container = made(name, Container)
    flat = container.state_dict()
    for part in model:
        for parameter in dict(part.named_parameters()):
            assert f"param_groups.{parameter}.lr" in flat and f"state.{parameter}.step" in flat
    plain = (torch.Tensor, int, float, str, bool, tuple, type(None))
    assert not [k for k, v in flat.items() if not isinstance(v, plain) and not k.endswith(".param_names")]
