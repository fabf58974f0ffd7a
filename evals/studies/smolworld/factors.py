"""What training leaves, small enough to be kept in git: tower and projector, then adapters.

The base weights are not in it: a model is built from the two files and the package of SmolLM2.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hipp_ext.errors import CheckpointError
from hipp_ext.evals.studies.smolworld.model import build_base
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import UNREADABLE, seal, unseal
from hipp_ext.recover.checkpoints import PROGRESS, WEIGHTS, Progress

WHOLE = ("model.vision_tower.", "model.multi_modal_projector.")
PEFT = "base_model.model."
A, B = ".lora_A.default.weight", ".lora_B.default.weight"
TOWER = "tower.safetensors"  # the tower, and the projector as it was trained with it
FACTORS = "factors.safetensors"  # all that was trained afterwards
COMMITTED = Path(__file__).parent / "weights"


def tensors_of(model: Any) -> dict[str, Tensor]:
    """The tower and the projector of a LLaVA, in half precision, by the names of its parameters."""
    return {
        name: p.detach().half() for name, p in model.named_parameters() if name.startswith(WHOLE)
    }


def tower_of(folder: Path) -> Path:
    """The file of the tower that training in a folder starts from: its own or the committed."""
    own = folder / TOWER
    return own if own.exists() else COMMITTED / TOWER


def write_factors(run: Path, file: Path, lora_alpha: float, tower: Path | None = None) -> int:
    """Write the factors of a run of `recover`, finished or not; the bytes written are returned.

    Args:
        run: folder of the run, whose last checkpoint counts.
        file: the file.
        lora_alpha: the run's.
        tower: file of the tower that the run went on from, whose digest is noted.

    Raises:
        CheckpointError: the run has no checkpoint, or it is damaged.
    """
    try:
        progress = Progress.model_validate(unseal(run / PROGRESS)[1])
        trained = unseal(run / f"step-{progress.step}" / WEIGHTS)[0]
    except UNREADABLE as error:
        raise CheckpointError(f"{run} holds no complete checkpoint of a run: {error}.") from None
    factors = {name.removeprefix(PEFT): t.half() for name, t in trained.items()}
    about = {"step": progress.step, "lora_alpha": lora_alpha}
    content = seal(factors, about | ({"tower": _digest(tower)} if tower else {}))
    write_atomic(file, content)
    return len(content)


def build_model(folder: Path) -> tuple[Any, Any]:
    """(model, processor) from the tower and the factors of a folder, and the package of SmolLM2.

    Raises:
        DataError: the package is not installed.
        CheckpointError: a file is missing or damaged, or the factors belong to another tower.
    """
    model, processor = build_base()
    tower = tower_of(folder)
    add_factors(model, tower)
    if add_factors(model, folder / FACTORS).get("tower") != _digest(tower):
        raise CheckpointError(
            f"{folder / FACTORS} was not trained from the tower {tower}. Repeat `train`."
        )
    return model, processor


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@torch.no_grad()
def add_factors(model: Any, file: Path) -> Mapping[str, Any]:
    """Load factors into a LLaVA in place; what is known of them is returned.

    Tower and projector are replaced, and adapters are added to the weights of the model.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to another model.
    """
    try:
        tensors, about = unseal(file)
        parameters = dict(model.named_parameters())
        for name, tensor in tensors.items():
            if name.endswith(B):
                continue  # comes with its other factor
            if name.endswith(A):
                down, up = tensor.float(), tensors[name.removesuffix(A) + B].float()
                scale = about["lora_alpha"] / len(down)
                parameters[name.removesuffix(A) + ".weight"].add_(scale * up @ down)
            else:
                _copy(parameters[name], tensor)
    except (*UNREADABLE, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} holds no factors of this model ({type(error).__name__}: {error}). Train some, "
            "or give another file."
        ) from None
    return about


def _copy(parameter: Tensor, tensor: Tensor) -> None:
    if parameter.shape != tensor.shape:
        raise ValueError(f"shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
    parameter.copy_(tensor)
