"""For the Trainer of transformers: checkpoints with the weights to evaluate with."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hbcore.integrations.weight_sets import put


class EvaluationWeights(TrainerCallback):
    """Puts the evaluation weights of schedule-free optimizers into the model before it is saved, and when training ends::

        Trainer(..., callbacks=[EvaluationWeights()])

    Trainer itself calls the optimizer's ``eval`` before an evaluation, and ``train`` before each batch. Without this callback,
    a checkpoint has the weights to train with, unless an evaluation came right before it. With it, a checkpoint has both sets,
    the second among the optimizer's state, and a resumed run goes on bit for bit. Other optimizers are left alone.

    Callbacks that ask for a checkpoint in ``on_step_end`` or ``on_epoch_end`` go before this one.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if optimizer is not None and (control.should_save or control.should_training_stop):
            put([optimizer], training=False)

    on_epoch_end = on_step_end
