"""Classifiers on disk: a folder with model.safetensors and config.json, pruned ones too."""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from hipp_ext.errors import CheckpointError
from hipp_ext.files import new_folder
from hipp_ext.robust.models import build_model


class ClassifierFile(BaseModel):
    """Contents of config.json.

    Attributes:
        network: name for `build_model`.
        classes: their names.
        shape: (channels, height, width) of the images.
        data: name of the image set it was trained on.
        split: seed of the set's split into training and test images, where it is drawn (digits).
        kept: group -> channels of the dense network that stayed; None: all.
    """

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    network: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    data: str
    split: int = 0
    kept: dict[str, tuple[int, ...]] | None = None


def save_classifier(model: nn.Module, config: ClassifierFile, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a classifier; the folder appears whole or not at all.

    Raises:
        OutputExistsError: the folder is there, and `overwrite` is False.
    """
    from safetensors.torch import save_file

    with new_folder(folder, overwrite) as temporary:
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, temporary / "model.safetensors")
        (temporary / "config.json").write_text(config.model_dump_json(indent=1) + "\n")


def load_classifier(folder: str | Path) -> tuple[nn.Module, ClassifierFile]:
    """(model in eval mode, its config) from a folder that `save_classifier` wrote; the random state stays as it is.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged, or its weights do not fit its config.
    """
    from safetensors.torch import load_file

    path = Path(folder)
    try:
        config = ClassifierFile.model_validate_json((path / "config.json").read_text())
        weights: dict[str, Any] = load_file(path / "model.safetensors")
        with torch.random.fork_rng(devices=[]):
            model = build_model(config.network, len(config.classes), config.shape)
        if config.kept is not None:
            from hipp_ext.integrations.torch_pruning_channels import prune_channels

            prune_channels(model, torch.zeros(1, *config.shape), config.kept)
        model.load_state_dict(weights)
    except (OSError, ValidationError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} holds no classifier that `hipp robust` can read ({str(error).splitlines()[0]}): "
            "model.safetensors and config.json as `hipp robust train` writes them are needed."
        ) from error
    except Exception as error:  # safetensors' own
        raise CheckpointError(f"{path / 'model.safetensors'} is damaged or truncated ({error}).") from error
    return model.eval(), config
