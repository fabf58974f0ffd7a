"""LQ-SGD in transformers' Trainer: `trainer.add_callback(LQSGDCallback(trainer, rank=4, bits=8))`."""

import inspect
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hipp_ext.comm.checkpoint import load_checkpoint, save_checkpoint
from hipp_ext.comm.ddp_hook import LQSGDState, register_lqsgd


class LQSGDCallback(TrainerCallback):
    """Registers the hook when training begins, and saves each rank's memory beside the Trainer's checkpoints.

    Resumed, it goes on from the memory in the very checkpoint that the Trainer resumes from, wherever that lies. A checkpoint
    without such memory, or one of another number of workers, costs the memory, not the run: see `load_checkpoint`.

    Args:
        trainer: wraps the model in DDP when training begins, which a callback is not told of otherwise.
        options: of `LQSGDState`.

    Attributes:
        state: the state while training; None before.

    Raises (when training begins):
        CompressionError: the Trainer runs with one process, or without DDP; or the checkpoint's state is damaged or of other
            parameters.
    """

    def __init__(self, trainer: Any, **options: Any):
        self.trainer, self.options = trainer, options
        self.state: LQSGDState | None = None
        self._registered_on: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wrapped by now: register."""
        wrapped = self.trainer.model_wrapped
        if self.state is None or wrapped is not self._registered_on:
            self.state = register_lqsgd(wrapped, **self.options)
            self._registered_on = wrapped
        else:  # a Trainer that trains again keeps its DDP, on which a hook can be registered only once
            self.state.start_over()
        if (checkpoint := _resumed_from(self.trainer, args, state)) is not None:
            load_checkpoint(self.state, checkpoint)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the memory the loss scale of fp16 training."""
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        if self.state is not None and scaler is not None:
            self.state.set_loss_scale(scaler.get_scale())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Each rank writes its own file."""
        if self.state is not None:
            save_checkpoint(self.state, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Bytes beside the loss."""
        if self.state is not None and isinstance(logs, dict):
            stats = self.state.stats()
            ours = {
                "lqsgd_bytes_sent": stats["bytes_sent"],
                "lqsgd_dense_bytes": stats["dense_bytes"],
            }
            logs |= ours
            if state.log_history:
                state.log_history[-1] |= ours  # written before callbacks are asked


def _resumed_from(trainer: Any, args: Any, state: Any) -> Path | None:
    """The checkpoint that `trainer.train(resume_from_checkpoint=...)` goes on from; None where it begins.

    Neither callbacks nor attributes of the Trainer are told of it (transformers 5.17), and the step does not give it away:
    other folders hold checkpoints of the same step. So the argument is read from the call of `train` that asks this callback.
    """
    asked: Any = None
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_locals.get("self") is trainer and "resume_from_checkpoint" in frame.f_locals:
            asked = frame.f_locals[
                "resume_from_checkpoint"
            ]  # innermost: what the Trainer itself was asked for
            break
        frame = frame.f_back
    if asked is True:
        asked = get_last_checkpoint(args.output_dir)
    elif not asked and state.global_step:  # a Trainer that resumes in a way of its own
        asked = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    return Path(asked) if asked else None
