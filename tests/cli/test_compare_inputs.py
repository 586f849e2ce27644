"""``hbcore compare --model`` and ``--data`` by path: the contract, and what is said of those that break it."""

from __future__ import annotations

import pytest
import torch

from hbcore.cli import compare

MODULE = """
import itertools, torch
from torch import nn

class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)
    def loss(self, x, y):
        return (self.linear(x) - y).square().mean()

def model(): return Regression()
def pair(): return nn.Linear(4, 1), lambda module, x, y: (module(x) - y).square().mean()

def data(split, batch_size, seed):
    generator = torch.Generator().manual_seed(seed)
    def one():
        x = torch.randn(batch_size, 4, generator=generator)
        return x, x.sum(1, keepdim=True)
    return (one() for _ in (range(3) if split == "validation" else itertools.count()))

class Silent(nn.Linear): pass
number = 3
def no_loss(): return Silent(4, 1)
def none(): return None
def raises(): raise RuntimeError("no weights")
def not_callable_loss(): return nn.Linear(4, 1), 3
def frozen(): return Regression().requires_grad_(False)
def vector(): return nn.Linear(4, 1), lambda module, x, y: (module(x) - y).square()
def constant(): return nn.Linear(4, 1), lambda module, x, y: 0.5
def detached(): return nn.Linear(4, 1), lambda module, x, y: (module(x) - y).square().mean().detach()
def wrong_input(): return nn.Linear(5, 1), lambda module, x, y: (module(x) - y).square().mean()

def few(split, batch_size, seed): return itertools.islice(data(split, batch_size, seed), 2)
def empty(split, batch_size, seed): return [] if split == "validation" else data(split, batch_size, seed)
def endless(split, batch_size, seed): return data("train", batch_size, seed)
def no_iterable(split, batch_size, seed): return 3
def bare(split, batch_size, seed): return itertools.repeat(torch.zeros(4, 4))
def no_rows(split, batch_size, seed): return itertools.repeat((torch.zeros(0, 4), torch.zeros(0, 1)))
def uneven(split, batch_size, seed): return itertools.repeat((torch.zeros(4, 4), torch.zeros(3, 1)))
def broken(split, batch_size, seed):
    yield from few(split, batch_size, seed) if split == "validation" else ()
    raise RuntimeError("disk on fire")
def other_arguments(split): return data(split, 4, 0)
"""


@pytest.fixture
def mine(tiny_run):
    (tiny_run.folder / "mine.py").write_text(MODULE)
    return tiny_run


def of_torch(name):
    return getattr(torch.optim, name)


@pytest.mark.parametrize("model", ["mine:model", "mine:pair"])
def test_a_model_and_data_by_path_are_trained(mine, capsys, model):
    words = ["AdamW", "--optimizer-args", "lr=0.1", "--model", model]
    assert mine(compare, *words, resolve=of_torch, steps=30, data="mine:data") == 0
    result = mine.json()
    assert result["model"] == {"name": model, "parameters": 5, "size": None}
    assert result["data"] == {"name": "mine:data", "bytes": None, "sha256": None}
    losses = result["runs"][0]["validation"]["loss"]
    assert losses[-1] < 0.1 * losses[0]
    out = capsys.readouterr().out
    assert f"{model} (0.00 M parameters): mine:data, 30 steps of batch size 4, seed 0, cpu" in out
    assert "nats" not in out and "val loss: lower is better" in out
    assert "nats" not in (mine.folder / "report.html").read_text()


def test_the_seed_decides_weights_and_training_batches_but_not_the_held_out_ones(mine):
    words = ["SGD", "--model", "mine:pair", "--seeds", "2", "--optimizer-args", "lr=0"]
    assert mine(compare, *words, resolve=of_torch, data="mine:data") == 0
    first, second = mine.json()["runs"]
    assert first["train"]["loss"] != second["train"]["loss"]
    assert mine(compare, *words[:3], *words[5:], resolve=of_torch, data="mine:data") == 0
    assert mine.json()["runs"][0]["train"]["loss"] == first["train"]["loss"]


def test_a_file_is_preferred_to_a_function(mine, monkeypatch):
    monkeypatch.chdir(mine.folder)
    (mine.folder / "mine:data").write_bytes(mine.text.read_bytes())
    assert mine(compare, "SGD", resolve=of_torch, data="mine:data") == 0
    assert mine.json()["data"]["bytes"] == len(mine.text.read_bytes())


MODELS = {
    "nowhere:model": "cannot import 'nowhere': ModuleNotFoundError",
    "mine": "expected package.module:function",
    "mine:absent": "'mine' has no 'absent'",
    "mine:number": "'number' is of type int, not a function",
    "mine:no_loss": "Silent has no method loss(*batch)",
    "mine:none": "expected a torch.nn.Module, or a pair of module and loss; it returned None",
    "mine:raises": "it raised RuntimeError: no weights",
    "mine:not_callable_loss": "the second of the pair must be a function",
    "mine:frozen": "no parameter that requires a gradient",
    "mine:vector": "must be a 0-d floating-point tensor that requires a gradient; got a tensor of shape [4, 1]",
    "mine:constant": "got a float",
    "mine:detached": "got a tensor of shape [] and dtype float32, which requires no gradient",
    "mine:wrong_input": "its loss of a batch of mine:data ([4, 4] float32, [4, 1] float32) raised RuntimeError",
}
DATA = {
    "nowhere:data": "cannot import 'nowhere'",
    "mine:empty": "expected 1 to 1000 validation batches; it yields none",
    "mine:endless": "it yields more than 1000",
    "mine:no_iterable": "raised TypeError: 'int' object is not iterable",
    "mine:bare": "must be a tuple of tensors; got a tensor of shape [4, 4]",
    "mine:no_rows": "not empty; got shapes [0, 4], [0, 1]",
    "mine:uneven": "of one length, the number of examples, and not empty; got shapes [4, 4], [3, 1]",
    "mine:broken": "batches raised RuntimeError: disk on fire",
    "mine:other_arguments": "raised TypeError",
    "no such file": "No such file",
}
CASES = [*(("mine:data", m, "--model", says) for m, says in MODELS.items())]
CASES += [(d, "mine:pair", "--data", says) for d, says in DATA.items()]


@pytest.mark.parametrize(("data", "model", "option", "says"), CASES, ids=lambda value: value if ":" in value else "")
def test_what_breaks_the_contract_is_one_line_and_trains_nothing(mine, capsys, data, model, option, says):
    assert mine(compare, "SGD", "--model", model, resolve=of_torch, data=data) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"hbcore compare: error: {option} ") and says in captured.err
    assert not (mine.folder / "compare.json").exists()


def test_batches_that_end_too_early_fail_the_run_with_their_count(mine, capsys):
    assert mine(compare, "SGD", "--model", "mine:pair", resolve=of_torch, data="mine:few") == 1
    error = mine.json()["runs"][0]["error"]
    assert "its training batches ended after 2; yield one for every step" in error
    assert len(mine.json()["runs"][0]["train"]["loss"]) == 2


def test_the_contract_is_in_the_help(capsys):
    import argparse

    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    shown = parser.format_help()
    assert compare.CONTRACT in shown
    for word in ("loss(*batch)", "split, batch_size, seed", '"validation"', "0-d"):
        assert word in compare.CONTRACT
