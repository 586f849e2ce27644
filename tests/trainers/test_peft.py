"""PEFT: adapters alone are trained, and saved with the optimizer they go on bit for bit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("peft", reason="needs peft")

from peft import LoraConfig, PeftModel, get_peft_model
from trainers.tiny import OPTIMIZERS, Tokens, differing, llama, smoke, weights
from transformers import Trainer, TrainingArguments

import hbcore

pytestmark = pytest.mark.usefixtures("one_thread")


def adapted(rank=2):
    base = llama()  # first: its generator's seed is the adapters' too
    return get_peft_model(base, LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))


def trained(model, optimizer, steps):
    data = Tokens()
    for i in steps:
        torch.manual_seed(100 + i)
        model.train()
        model(input_ids=data.rows[4 * i : 4 * i + 4], labels=data.rows[4 * i : 4 * i + 4]).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", smoke("AdamW", "MuonAdamW", "SFAdamW"))
def test_adapters_saved_and_loaded_go_on_bit_for_bit(tmp_path, name):
    model = adapted()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = hbcore.create(name, model, **OPTIMIZERS[name])
    trained(model, optimizer, range(3))
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    trained(model, optimizer, range(3, 6))

    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    resumed = hbcore.create(name, again, **OPTIMIZERS[name])
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    trained(again, resumed, range(3, 6))
    assert not differing(weights(model), weights(again))
    assert not [n for n, w in frozen.items() if not torch.equal(w, model.get_parameter(n))]


def test_frozen_weights_take_no_state():
    model = adapted()
    optimizer = hbcore.create("AdamW", model)
    trained(model, optimizer, range(1))
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert len(optimizer.state) == len(adapters) == len(optimizer.state_dict()["state"]) == 4


@pytest.mark.parametrize("name", smoke("AdamW"))
def test_adapters_resume_under_trainer_bit_for_bit(tmp_path, name):
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model = adapted()
        before = weights(model)
        args = TrainingArguments(
            str(tmp_path), max_steps=6, save_steps=3, use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no"
        )
        given = (hbcore.create(name, model, **OPTIMIZERS[name]), None)
        Trainer(model=model, args=args, train_dataset=Tokens(), optimizers=given).train(resume_from_checkpoint=checkpoint)
        ends.append(weights(model))
        assert all("lora" in n for n in differing(before, ends[-1]))
        assert len(differing(before, ends[-1])) == 4
    assert not differing(*ends)
