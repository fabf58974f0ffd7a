"""LQ-SGD in transformers' Trainer.

trainer.add_callback(LQSGDCallback(trainer, rank=4, bits=8))
"""

import inspect
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hipp_ext.comm.checkpoint import load_checkpoint, save_checkpoint
from hipp_ext.comm.ddp_hook import register_lqsgd
from hipp_ext.comm.state import LQSGDState


class LQSGDCallback(TrainerCallback):
    """Registers the hook when training begins, and saves each rank's residual with checkpoints.

    A resumed training goes on from the residual in the checkpoint that the Trainer resumes from.
    If that checkpoint has no residual, or was saved with another number of workers, training goes
    on with an empty residual: see `load_checkpoint`.

    Args:
        trainer: the Trainer, which wraps the model in DDP when training begins.
        options: keyword arguments of `LQSGDState`.

    Attributes:
        state: the state while training; None before.

    Raises (when training begins):
        CompressionError: the Trainer runs with one process or without DDP, or the state in the
            checkpoint is damaged or belongs to other parameters.
    """

    def __init__(self, trainer: Any, **options: Any):
        self.trainer, self.options = trainer, options
        self.state: LQSGDState | None = None
        self._registered_on: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Register the hook on the model, which is wrapped by now."""
        wrapped = self.trainer.model_wrapped
        if self.state is None or wrapped is not self._registered_on:
            self.state = register_lqsgd(wrapped, **self.options)
            self._registered_on = wrapped
        else:  # a second training keeps its DDP, which takes a hook only once
            self.state.start_over()
        if (checkpoint := _resumed_from(self.trainer, args, state)) is not None:
            load_checkpoint(self.state, checkpoint)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass on the loss scale of fp16 training."""
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        if self.state is not None and scaler is not None:
            self.state.set_loss_scale(scaler.get_scale())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the file of this rank."""
        if self.state is not None:
            save_checkpoint(self.state, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add bytes to the logged values."""
        if self.state is not None and isinstance(logs, dict):
            stats = self.state.stats()
            ours = {f"lqsgd_{name}": stats[name] for name in ("bytes_sent", "dense_bytes")}
            logs |= ours
            if state.log_history:
                state.log_history[-1] |= ours  # it was written before callbacks are called


def _resumed_from(trainer: Any, args: Any, state: Any) -> Path | None:
    """The checkpoint that `trainer.train(resume_from_checkpoint=...)` goes on from, or None.

    Callbacks and attributes of the Trainer do not contain it (transformers 5.17), and other folders
    can hold checkpoints of the same step. So the argument is read from the call of `train`.
    """
    asked: Any = None
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_locals.get("self") is trainer and "resume_from_checkpoint" in frame.f_locals:
            asked = frame.f_locals["resume_from_checkpoint"]  # of the innermost call
            break
        frame = frame.f_back
    if asked is True:
        asked = get_last_checkpoint(args.output_dir)
    elif not asked and state.global_step:  # a subclass may resume in another way
        asked = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    return Path(asked) if asked else None
