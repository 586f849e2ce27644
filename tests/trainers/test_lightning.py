"""Lightning: both kinds of optimization, closures, the command line, resumed runs, and two sets of weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("lightning", reason="needs lightning")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset
from trainers.tiny import OPTIMIZERS, differing, smoke, weights

import hbcore
from hbcore.integrations.lightning import EvaluationWeights

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def loader(batches=3):
    """An epoch: Lightning goes on with the next epoch's data after a resume, and not within one."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4 * batches, 6, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].sin()), batch_size=4)


class Net(LightningModule):
    """A net for ``optimizer(named parameters)``, or for the optimizer that the command line brings."""

    def __init__(self, optimizer=None, manual=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        self.make, self.automatic_optimization, self.passes, self.validated = optimizer, not manual, 0, []

    def loss(self, batch):
        self.passes += 1
        return (self.net(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch, index):
        loss = self.loss(batch)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def validation_step(self, batch, index):
        self.validated.append(weights(self.net))
        self.log("loss", self.loss(batch))

    def configure_optimizers(self):
        return self.make(self.named_parameters())


def maker(name, **more):
    return lambda params: hbcore.get(name)(list(params), **{**OPTIMIZERS.get(name, {}), **more})


def fit(folder, module, callbacks=(), ckpt_path=None, validate=False, steps=6, **more):
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    checkpoints = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = Trainer(
        default_root_dir=folder,
        max_steps=steps,
        callbacks=[*callbacks, *([checkpoints] if more.get("enable_checkpointing", True) else [])],
        val_check_interval=3 if validate else None,
        limit_val_batches=1 if validate else 0,
        num_sanity_val_steps=0,
        **{**options, **more},
    )
    data = loader(3 * trainer.accumulate_grad_batches)
    trainer.fit(module, data, data if validate else None, ckpt_path=ckpt_path)
    return trainer


VARIANTS = {
    "automatic": {},
    "manual": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 0.05},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
}


@pytest.mark.parametrize("variant", [v if v == "automatic" else pytest.param(v, marks=pytest.mark.full) for v in VARIANTS])
@pytest.mark.parametrize("name", smoke("AdamW", "MuonAdamW"))
def test_a_resumed_run_ends_bit_for_bit_like_one_without_a_break(tmp_path, name, variant):
    ends = []
    for checkpoint in (None, tmp_path / "step=3.ckpt"):
        module = Net(maker(name), manual=variant == "manual")
        before = weights(module)
        fit(tmp_path, module, ckpt_path=checkpoint, **VARIANTS[variant])
        ends.append(weights(module))
        assert len(differing(before, ends[-1])) == len(before)
    assert not differing(*ends)


def test_manual_and_automatic_optimization_agree(tmp_path):
    modules = [Net(maker("AdamW"), manual=manual) for manual in (False, True)]
    for module in modules:
        fit(tmp_path / str(module.automatic_optimization), module)
    assert not differing(*map(weights, modules))


@pytest.mark.parametrize(
    ("name", "options", "passes"),
    [("AdamW", {}, 6), ("SAMWrapper", {}, 12), ("PSGDKron", {"hessian_approx": True, "lr": 0.01}, 6)],
    ids=["AdamW", "SAM", "Newton"],
)
def test_lightning_hands_over_a_closure(tmp_path, name, options, passes):
    """What needs one works without a line of code: SAM runs it twice, a Newton rule differentiates it once more."""
    module = Net(maker(name, **options))
    before = weights(module)
    trainer = fit(tmp_path, module)
    assert module.passes == passes
    assert trainer.optimizers[0].requires_closure == (name != "AdamW")
    assert len(differing(before, weights(module))) == len(before)


@pytest.mark.parametrize(("name", "options"), [("SAMWrapper", {}), ("PSGDKron", {"hessian_approx": True})])
def test_manual_optimization_without_a_closure_is_an_error_for_what_needs_one(tmp_path, name, options):
    """Lightning passes a closure that does nothing then."""
    with pytest.raises(hbcore.OptionError, match="closure computed no gradients"):
        fit(tmp_path, Net(maker(name, **options), manual=True))


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("callback", [None, EvaluationWeights])
def test_schedule_free_runs_resume_bit_for_bit_with_either_set_of_weights(tmp_path, callback, validate):
    ends = []
    for checkpoint in (None, tmp_path / "step=3.ckpt"):
        module = Net(maker("SFAdamW"))
        fit(tmp_path, module, [callback()] if callback else [], checkpoint, validate=validate)
        ends.append(weights(module))
    assert not differing(*ends)


class Both(Callback):
    """Notes both sets of weights after each batch, before anybody else does anything."""

    def __init__(self):
        self.sets = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        [optimizer] = trainer.optimizers
        optimizer.eval()
        to_evaluate = weights(pl_module)
        optimizer.train()
        self.sets.append((weights(pl_module), to_evaluate))


@pytest.mark.parametrize("callback", [None, EvaluationWeights])
def test_which_weights_validation_checkpoints_and_the_fitted_module_have(tmp_path, callback):
    """Without the callback, all three have the weights to train with."""
    module, both = Net(maker("SFAdamW")), Both()
    fit(tmp_path, module, [both, *([callback()] if callback else [])], validate=True)
    chosen = 1 if callback else 0
    assert all(differing(*sets) for sets in both.sets[2:])
    validated, expected = module.validated, [both.sets[i][chosen] for i in (2, 5)]
    for i, wanted in enumerate(expected):
        inner = {name.removeprefix("net."): w for name, w in wanted.items()}
        assert not differing(validated[i], inner)
    for step, wanted in zip((3, 6), expected, strict=True):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert not differing(saved["state_dict"], wanted)
    assert not differing(weights(module), expected[-1])


def test_validation_and_the_fitted_module_have_the_weights_to_evaluate_with_if_nothing_is_saved(tmp_path):
    module, both = Net(maker("SFAdamW")), Both()
    fit(tmp_path, module, [both, EvaluationWeights()], validate=True, enable_checkpointing=False, steps=5)
    assert not differing({f"net.{name}": w for name, w in module.validated[0].items()}, both.sets[2][1])
    assert not differing(weights(module), both.sets[4][1])


def test_a_checkpoint_without_an_optimizer_has_the_weights_to_evaluate_with(tmp_path):
    module, both = Net(maker("SFAdamW")), Both()
    trainer = fit(tmp_path, module, [both, EvaluationWeights()])
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert not differing(torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"], both.sets[-1][1])


def test_the_callback_leaves_other_optimizers_alone(tmp_path):
    ends = []
    for i, callbacks in enumerate(([], [EvaluationWeights()])):
        module = Net(maker("AdamW"))
        fit(tmp_path / str(i), module, callbacks, validate=True)
        ends.append(weights(module))
    assert not differing(*ends)


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("hb_adam.AdamW", ["--optimizer.lr=0.02", "--optimizer.betas=[0.8, 0.9]", "--optimizer.weight_decay=0.3"]),
        ("hb_muon.Muon", ["--optimizer.lr=0.02", "--optimizer.ns_steps=3"]),
        ("hb_soap.SOAP", ["--optimizer.lr=0.02", "--optimizer.caution=true"]),
    ],
)
def test_the_command_line_takes_a_class_path_and_its_options(tmp_path, path, arguments, monkeypatch):
    class Plain(Net):
        def __init__(self):
            super().__init__()

        def train_dataloader(self):
            return loader()

        configure_optimizers = LightningModule.configure_optimizers

    monkeypatch.chdir(tmp_path)
    cli = LightningCLI(
        Plain,
        args=["fit", f"--optimizer={path}", *arguments, "--trainer.max_steps=2", "--trainer.accelerator=cpu"],
        trainer_defaults={"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "barebones": False},
        save_config_callback=None,
    )
    [optimizer] = cli.trainer.optimizers
    assert type(optimizer) is hbcore.get(path.rpartition(".")[2])
    assert optimizer.param_groups[0]["lr"] == 0.02
    if "AdamW" in path:
        assert optimizer.param_groups[0]["betas"] == (0.8, 0.9) and optimizer.param_groups[0]["weight_decay"] == 0.3
    if "SOAP" in path:
        assert optimizer.settings.caution
