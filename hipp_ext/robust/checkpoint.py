"""Classifiers on disk: a folder with model.safetensors and config.json, pruned ones too."""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from hipp_ext.errors import CheckpointError, MissingExtraError
from hipp_ext.files import new_folder
from hipp_ext.files.untrusted import read_plain
from hipp_ext.robust.models import build_model

MAX_TEXT = 16 << 20  # bytes of config.json
MAX_CLASSES, MAX_CHANNELS, MAX_SIDE = 100_000, 1024, 16_384
TRACE_SIDE = 64  # pixels; enough to trace channels
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]


class ClassifierFile(BaseModel):
    """Contents of config.json.

    Attributes:
        network: name for `build_model`.
        classes: names of the classes.
        shape: (channels, height, width) of the images.
        data: name of the image set that it was trained on.
        split: random seed of the split into training and test images (digits).
        kept: group -> channels of the dense network that stay; None: all.
    """

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    network: str
    classes: tuple[str, ...] = Field(min_length=1, max_length=MAX_CLASSES)
    shape: tuple[Annotated[int, Field(ge=1, le=MAX_CHANNELS)], Side, Side]
    data: str
    split: int = 0
    kept: dict[str, tuple[int, ...]] | None = None


def save_classifier(
    model: nn.Module, config: ClassifierFile, folder: str | Path, *, overwrite: bool = False
) -> None:
    """Write a classifier; the folder appears complete or not at all.

    Raises:
        OutputExistsError: the folder exists, and `overwrite` is False.
    """
    from safetensors.torch import save_file

    with new_folder(folder, overwrite) as temporary:
        tensors = {n: t.contiguous() for n, t in model.state_dict().items()}
        save_file(tensors, temporary / "model.safetensors")
        (temporary / "config.json").write_text(config.model_dump_json(indent=1) + "\n")


def load_classifier(folder: str | Path) -> tuple[nn.Module, ClassifierFile]:
    """(model in eval mode, its config) from a folder that `save_classifier` wrote.

    The folder is untrusted: sizes are checked before anything is built, and only numbers and text
    are read. The global random state stays as it is.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged, or its weights do not fit its
            config.
        MissingExtraError: the network's library is not installed.
    """
    from safetensors.torch import load_file

    path = Path(folder)
    try:
        text = read_plain(path / "config.json", MAX_TEXT)
        config = ClassifierFile.model_validate_json(text)
        if not (path / "model.safetensors").is_file():  # opening a pipe would block
            raise ValueError("model.safetensors is missing")
        weights = load_file(path / "model.safetensors")
        model = _empty(config)
        _check_weights(weights, model.state_dict())
        model.load_state_dict(weights)
    except MissingExtraError:
        raise
    except Exception as error:  # pydantic's, safetensors', torch's, the file system's
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise CheckpointError(
            f"{path} holds no classifier that `hipp robust` can read ({reason}): model.safetensors "
            "and config.json as `hipp robust train` writes them are needed."
        ) from error
    return model.eval(), config


def _empty(config: ClassifierFile) -> nn.Module:
    """The network that the config describes, with random weights."""
    with torch.random.fork_rng(devices=[]):
        model = build_model(config.network, len(config.classes), config.shape)
    if config.kept is not None:
        from hipp_ext.integrations.torch_pruning_channels import prune_channels

        # The coupling of channels does not depend on the size of the images.
        height, width = (min(n, TRACE_SIDE) for n in config.shape[1:])
        prune_channels(model, torch.zeros(1, config.shape[0], height, width), config.kept)
    return model


def _check_weights(weights: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, tensor in weights.items():
        if name in expected and tensor.dtype != expected[name].dtype:
            raise ValueError(f"{name} holds {tensor.dtype}, not {expected[name].dtype}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or infinity")
