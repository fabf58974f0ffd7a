"""A tiny trained LLaVA and its picture world: all parts of hipp-ext run on it, offline.

model, processor = testbed.load()
batches = testbed.calibration_batches(processor)
questions = testbed.questions("POPE", "test", 100)
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipp_ext.errors import CheckpointError
from hipp_ext.testbed.batches import calibration_batches, calibration_tasks, calibration_texts
from hipp_ext.testbed.quiz import TASKS, Question, questions
from hipp_ext.testbed.training import train
from hipp_ext.testbed.tsv import export
from hipp_ext.testbed.world import SPLITS

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

WEIGHTS = Path(__file__).parent / "weights"

__all__ = [
    "SPLITS",
    "TASKS",
    "WEIGHTS",
    "Question",
    "calibration_batches",
    "calibration_tasks",
    "calibration_texts",
    "export",
    "is_testbed",
    "load",
    "questions",
    "train",
]


def is_testbed(model: Any) -> bool:
    """Whether `model` was loaded from the packaged weights."""
    folder = getattr(getattr(model, "config", None), "_name_or_path", "")
    return bool(folder) and Path(folder).resolve() == WEIGHTS.resolve()


def load(
    device: str = "cpu", dtype: Any = None, folder: str | Path = WEIGHTS
) -> "tuple[LlavaForConditionalGeneration, LlavaProcessor]":
    """The trained model in eval mode and its processor; nothing is downloaded.

    Args:
        device: device of the model.
        dtype: type of the parameters; None: float32.
        folder: folder that `train` wrote; default: the packaged weights.

    Raises:
        CheckpointError: `folder` has no model, or a damaged one.
    """
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from hipp_ext.surgery.model_folder import read_folder

    if not (Path(folder) / "model.safetensors").is_file():
        raise CheckpointError(
            f"{folder} holds no model.safetensors. Train one: hipp testbed train --out {folder}"
        )
    read_folder(folder)
    model = LlavaForConditionalGeneration.from_pretrained(
        folder,
        dtype=dtype or torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval(), AutoProcessor.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
