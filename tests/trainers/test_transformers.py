"""The Trainer of transformers: resumed runs, accumulation, clipping, bfloat16, schedules, names and two sets of weights."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="needs accelerate")

from safetensors.torch import load_file
from trainers.tiny import OPTIMIZERS, Tokens, differing, llama, smoke, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

import hbcore
from hbcore.integrations.transformers import EvaluationWeights

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "clipped": {"max_grad_norm": 0.05},
    "autocast": {"bf16": True},
    "bfloat16": {},
}


def trainer(folder, name, variant="plain", callbacks=(), by="class", **more):
    """A Trainer of six steps that saves at the third; ``by`` says which of Trainer's ways brings the optimizer."""
    model = llama(dtype=torch.bfloat16 if variant == "bfloat16" else torch.float32)
    schedule = {} if name == "SFAdamW" else {"lr_scheduler_type": "cosine", "warmup_steps": 2}
    options = {"max_steps": 6, "save_steps": 3, **schedule, **VARIANTS[variant], **more}
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    kwargs = dict(OPTIMIZERS[name])
    if by == "object":
        given = {"optimizers": (hbcore.create(name, model, **kwargs), None)}
    elif name == "MuonAdamW":
        given = {"optimizer_cls_and_kwargs": (hbcore.get(name), {"params": list(model.named_parameters()), **kwargs})}
    else:
        given = {"optimizer_cls_and_kwargs": (hbcore.get(name), kwargs)}
    data = Tokens()
    return Trainer(model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=list(callbacks), **given)


def resumed(tmp_path, name, variant, by="class", callback=None, **more):
    """The weights after a run without a break, and after one that goes on from its checkpoint."""
    ran = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        run = trainer(tmp_path, name, variant, [callback()] if callback else (), by, **more)
        before = weights(run.model)
        run.train(resume_from_checkpoint=checkpoint)
        ran.append(weights(run.model))
        assert differing(before, ran[-1]) == sorted(before), "all parameters have moved"
    return ran


@pytest.mark.parametrize("variant", ["plain", *(pytest.param(v, marks=pytest.mark.full) for v in VARIANTS if v != "plain")])
@pytest.mark.parametrize("name", smoke("AdamW", "MuonAdamW"))
def test_a_resumed_run_ends_bit_for_bit_like_one_without_a_break(tmp_path, name, variant):
    straight, again = resumed(tmp_path, name, variant)
    assert not differing(straight, again)


@pytest.mark.parametrize("variant", ["bfloat16", "autocast"])
def test_weights_kept_in_more_bits_than_the_model_has_resume_bit_for_bit(tmp_path, variant, monkeypatch):
    """The model's file has them rounded to bfloat16; the rest of their bits is in the optimizer's."""
    monkeypatch.setitem(OPTIMIZERS, "AdamW", {"lr": 0.01, "param_ecc": "bf16+8"})
    straight, again = resumed(tmp_path, "AdamW", variant)
    assert not differing(straight, again)
    assert {w.dtype for w in straight.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", smoke("AdamW"))
def test_an_optimizer_that_was_made_before_resumes_too(tmp_path, name):
    straight, again = resumed(tmp_path, name, "plain", by="object")
    assert not differing(straight, again)


def test_clipping_and_accumulation_reach_the_optimizer(tmp_path):
    """So that a variant above which changes nothing is noticed."""
    ends = []
    for variant in ("plain", "clipped", "accumulated"):
        run = trainer(tmp_path, "AdamW", variant, save_strategy="no")
        run.train()
        ends.append(weights(run.model))
    assert differing(ends[0], ends[1]) and differing(ends[0], ends[2])


def test_a_schedule_of_transformers_sets_the_rate_of_each_group(tmp_path):
    seen = []

    class Rates(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, **_):
            seen.append([group["lr"] for group in optimizer.param_groups])

    trainer(tmp_path, "AdamW", callbacks=[Rates()], save_strategy="no", lr_scheduler_type="linear").train()
    assert seen == [[pytest.approx(0.01 * rate)] * 2 for rate in (0.5, 1, 0.75, 0.5, 0.25, 0)]


def test_trainer_decays_no_norm_and_its_groups_have_no_names(tmp_path):
    run = trainer(tmp_path, "AdamW", save_strategy="no", weight_decay=0.3)
    run.create_optimizer()
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.3, 0.0]
    assert "param_names" not in run.optimizer.param_groups[0]


@pytest.mark.parametrize("by", ["class", "object"])
def test_named_parameters_route_embeddings_and_head_to_adamw(tmp_path, by):
    run = trainer(tmp_path, "MuonAdamW", by=by, save_strategy="no")
    run.create_optimizer()
    matrices = {n for group in run.optimizer.param_groups if group["use_muon"] for n in group["param_names"]}
    assert matrices == {n for n, p in run.model.named_parameters() if p.ndim == 2 and ".layers." in n}


@pytest.mark.parametrize("callback", [None, EvaluationWeights])
@pytest.mark.parametrize("evaluate", [False, True])
def test_schedule_free_runs_resume_bit_for_bit_with_either_set_of_weights(tmp_path, callback, evaluate):
    more = {"eval_strategy": "steps", "eval_steps": 3} if evaluate else {}
    straight, again = resumed(tmp_path, "SFAdamW", "plain", callback=callback, **more)
    assert not differing(straight, again)


def both_sets(model, optimizer):
    """The weights to train with, and those to evaluate with; the model has the latter afterwards."""
    sets = []
    for switch in (optimizer.train, optimizer.eval):
        switch()
        sets.append(weights(model))
    assert differing(*sets)
    return sets


@pytest.mark.parametrize("callback", [None, EvaluationWeights])
def test_which_weights_the_model_has_after_training(tmp_path, callback):
    run = trainer(tmp_path, "SFAdamW", callbacks=[callback()] if callback else (), save_strategy="no")
    run.train()
    after = weights(run.model)
    assert not differing(after, both_sets(run.model, run.optimizer)[1 if callback else 0])


@pytest.mark.parametrize("callback", [None, EvaluationWeights])
def test_which_weights_a_checkpoint_has(tmp_path, callback):
    """Trainer calls ``eval()`` before an evaluation only: without the callback, the weights to train with are saved."""
    saved = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, model, optimizer, **_):
            file = load_file(tmp_path / f"checkpoint-{state.global_step}" / "model.safetensors")
            sets = both_sets(model, optimizer)
            expected = sets[1 if callback else 0]
            saved.append((state.global_step, differing({name: file[name] for name in expected}, expected)))

    run = trainer(tmp_path, "SFAdamW", callbacks=[Look(), *([callback()] if callback else [])])
    run.train()
    assert saved == [(3, []), (6, [])]


def test_an_evaluation_sees_the_weights_to_evaluate_with_and_training_goes_on(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, model, optimizer, **_):
            seen.append((weights(model), optimizer.param_groups[0]["train_mode"]))

        def on_optimizer_step(self, args, state, control, model, optimizer, **_):
            seen.append((weights(model), optimizer.param_groups[0]["train_mode"]))

    run = trainer(tmp_path, "SFAdamW", callbacks=[Look()], save_strategy="no", eval_strategy="steps", eval_steps=3)
    run.train()
    assert [mode for _, mode in seen] == [True, True, True, False] * 2
    assert differing(seen[2][0], seen[3][0])


def test_the_best_model_is_loaded_as_it_was_evaluated(tmp_path):
    more = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True, "max_steps": 4}
    run = trainer(tmp_path, "SFAdamW", callbacks=[EvaluationWeights()], **more)
    run.train()
    best = load_file(f"{run.state.best_model_checkpoint}/model.safetensors")
    assert not differing({n: best[n] for n in weights(run.model)}, weights(run.model))
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, abs=1e-7)


def test_the_callback_leaves_other_optimizers_alone(tmp_path):
    ends = []
    for callbacks in ((), [EvaluationWeights()]):
        run = trainer(tmp_path, "AdamW", callbacks=callbacks)
        run.train()
        ends.append(weights(run.model))
    assert not differing(*ends)
