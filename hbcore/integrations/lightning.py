"""For Lightning: validation and checkpoints with the weights to evaluate with."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hbcore.integrations.weight_sets import put, with_two_sets


class EvaluationWeights(Callback):
    """Puts the evaluation weights of schedule-free optimizers into the model wherever it is not trained::

        Trainer(callbacks=[EvaluationWeights()])

    Lightning does not call an optimizer's ``train`` and ``eval``; without this callback, it validates and saves the weights to
    train with. With it, validation, test, prediction, checkpoints, and the model after ``fit`` have those to evaluate with. A
    checkpoint has both sets, the second among the optimizer's state, and a resumed run goes on bit for bit. Other optimizers
    are left alone.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        put(trainer.optimizers, training=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        put(trainer.optimizers, training=False)

    on_test_start = on_predict_start = on_train_end = on_validation_start

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Collect again what Lightning has collected, with the other weights: strategies that shard have made copies.

        The next batch goes back to the weights to train with.
        """
        if not with_two_sets(trainer.optimizers):
            return
        put(trainer.optimizers, training=False)
        checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [trainer.strategy.optimizer_state(o) for o in trainer.optimizers]
