"""LQ-SGD in transformers' Trainer: `trainer.add_callback(LQSGDCallback(trainer, rank=4, bits=8))`."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hipp_ext.comm.ddp_hook import LQSGDState, register_lqsgd
from hipp_ext.comm.saving import load_state, save_state


class LQSGDCallback(TrainerCallback):
    """Registers the hook when training begins, and saves each rank's memory beside the Trainer's checkpoints.

    Args:
        trainer: wraps the model in DDP when training begins, which a callback is not told of otherwise.
        options: of `LQSGDState`.

    Attributes:
        state: the state while training; None before.

    Raises (when training begins):
        CompressionError: the Trainer runs with one process, or without DDP.
    """

    def __init__(self, trainer: Any, **options: Any):
        self.trainer, self.options = trainer, options
        self.state: LQSGDState | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wrapped by now: register."""
        self.state = register_lqsgd(self.trainer.model_wrapped, **self.options)
        if state.global_step and (folder := get_last_checkpoint(args.output_dir)):
            load_state(self.state, self._file(folder))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the memory the loss scale of fp16 training."""
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        if self.state is not None and scaler is not None:
            self.state.set_loss_scale(scaler.get_scale())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Each rank writes its own file."""
        if self.state is not None:
            save_state(self.state, self._file(Path(args.output_dir) / f"checkpoint-{state.global_step}"))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Bytes beside the loss."""
        if self.state is not None and isinstance(logs, dict):
            stats = self.state.stats()
            ours = {"lqsgd_bytes_sent": stats["bytes_sent"], "lqsgd_dense_bytes": stats["dense_bytes"]}
            logs |= ours
            if state.log_history:
                state.log_history[-1] |= ours  # written before callbacks are asked

    def _file(self, folder: str | Path) -> Path:
        assert self.state is not None
        return Path(folder) / f"lqsgd.rank{self.state.compressor.position}.safetensors"
