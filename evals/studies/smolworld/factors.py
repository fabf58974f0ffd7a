"""What training leaves, small enough to be kept in git: tower, projector, and adapters.

The base weights are not in it: a model is built from these factors and the package of SmolLM2.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hipp_ext.errors import CheckpointError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import UNREADABLE, seal, unseal
from hipp_ext.recover.checkpoints import PROGRESS, WEIGHTS, Progress

WHOLE = ("model.vision_tower.", "model.multi_modal_projector.")
PEFT = "base_model.model."
A, B = ".lora_A.default.weight", ".lora_B.default.weight"
TOWER = Path(__file__).parent / "weights/tower.safetensors"  # of tower and projector alone
COMMITTED = TOWER.with_name("factors.safetensors")


def tensors_of(model: Any) -> dict[str, Tensor]:
    """The tower and the projector of a LLaVA, in half precision, by the names of its parameters."""
    return {
        name: p.detach().half() for name, p in model.named_parameters() if name.startswith(WHOLE)
    }


def write_factors(run: Path, model: Any, file: Path, lora_alpha: float) -> int:
    """Write the factors of a run of `recover`, finished or not; the bytes written are returned.

    Args:
        run: folder of the run, whose last checkpoint counts.
        model: the model that the run trains or trained, whose tower counts where the run left it.
        file: the file.
        lora_alpha: the run's.

    Raises:
        CheckpointError: the run has no checkpoint, or it is damaged.
    """
    try:
        progress = Progress.model_validate(unseal(run / PROGRESS)[1])
        trained = unseal(run / f"step-{progress.step}" / WEIGHTS)[0]
    except UNREADABLE as error:
        raise CheckpointError(f"{run} holds no complete checkpoint of a run: {error}.") from None
    factors = tensors_of(model)
    factors |= {name.removeprefix(PEFT): t.half() for name, t in trained.items()}
    content = seal(factors, {"step": progress.step, "lora_alpha": lora_alpha})
    write_atomic(file, content)
    return len(content)


@torch.no_grad()
def add_factors(model: Any, file: Path) -> Mapping[str, Any]:
    """Load factors into a LLaVA in place; what is known of them is returned.

    Tower and projector are replaced, and adapters are added to the weights of the base model.

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
