"""Reading a model folder that may come from anybody: what it holds is checked before a model is
built of it.

Configuration and weights must agree before memory is taken, weights are safetensors and lie in the
folder, and no code of the folder is run.
"""

import contextlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from hipp_ext.errors import CheckpointError
from hipp_ext.groups import Kind, Tower

MANIFEST = "hipp_ext.json"
_CONFIG, _WEIGHTS, _INDEX, _ADAPTERS = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
)
_TEMPLATES = (
    "additional_chat_templates"  # the only folder in a model folder that transformers reads
)
_LARGEST_JSON = 1 << 26  # bytes; the index of a model with 100,000 tensors has a tenth of it
_LARGEST_NUMBER = 1 << 31
_LOOPED_OVER = re.compile(
    r"layers?$|depths?$|blocks?$|stages?$|experts?$"
)  # sizes that say how many modules are built
_COUNTS = re.compile(r"^(num|n)_")  # num_labels, for one: as many entries of a dict are made
_SLACK = 1 << 24  # entries of parameters that no file has: those of small towers that are made anew


class GroupWidth(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tower: Tower
    layer: int = Field(ge=0)
    kind: Kind
    width: int = Field(ge=0, lt=_LARGEST_NUMBER)  # 0: the block was dropped
    # That stock transformers builds before the language tower, where no configuration names widths
    # layer by layer.
    stock: int | None = Field(default=None, ge=1, lt=_LARGEST_NUMBER)

    @property
    def name(self) -> str:
        """Key of the group, as `Group.name`."""
        return f"{self.tower}.{self.layer}.{self.kind}"


class Manifest(BaseModel):
    """Contents of hipp_ext.json."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    architecture: str
    groups: list[GroupWidth]


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """What a folder says of its model.

    Attributes:
        path: the folder.
        config: contents of config.json.
        manifest: contents of hipp_ext.json; None where there is none.
        shapes: shape of every tensor of the weights, by its name there.
    """

    path: Path
    config: Mapping[str, Any]
    manifest: Manifest | None
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def quantised(self) -> bool:
        """Whether weights are packed, so that their shapes may not be those of the layers."""
        return "quantization_config" in self.config


def damaged(folder: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{folder} could not be loaded, it is incomplete or damaged: {why}")


def read_folder(
    path: str | Path, variant: str | None = None, *, weights: bool = True
) -> ModelFolder:
    """The model folder at `path`, no weights read yet.

    Args:
        path: the folder.
        variant: of the weights, as in transformers' `from_pretrained`.
        weights: whether the folder has to have weights; False: their shapes are not read.

    Raises:
        CheckpointError: it is no model folder; a file of it is damaged, or no regular file; its
            configuration asks for what its weights do not have; it holds adapters, pickled weights,
            or a model that needs code of its own.
    """
    folder = Path(path)
    if not (folder / _CONFIG).is_file():
        raise CheckpointError(no_folder(folder))
    check_files(folder)
    config = read_json(folder / _CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / _CONFIG} is damaged: it holds no object.")
    manifest = _read_manifest(folder)
    shapes = _shapes(folder, variant) if weights else {}
    _check_config(folder, config, shapes)
    return ModelFolder(path=folder, config=config, manifest=manifest, shapes=shapes)


def model_class(folder: ModelFolder) -> Any:
    """The transformers class that config.json names.

    Raises:
        CheckpointError: it names none, or one that transformers does not have.
    """
    import transformers

    file = folder.path / _CONFIG
    try:
        name = folder.config["architectures"][0]
        found = getattr(transformers, str(name), None)
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{file} is damaged or names no architecture: {error!r}") from None
    except (
        ImportError,
        RuntimeError,
    ) as error:  # it is imported at this moment, and wants another library
        raise CheckpointError(
            f"{file} names the architecture {name!r}, which cannot be imported here: {error}"
        ) from None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    if "auto_map" in folder.config:
        raise CheckpointError(
            f"{file} names the architecture {name!r}, which needs Python code that lies in the "
            "folder (auto_map). hipp-ext "
            "runs no code from model folders; only architectures that transformers has itself are "
            "supported."
        )
    raise CheckpointError(
        f"{file} names the architecture {name!r}, which transformers does not have."
    )


def keys_in(
    model: nn.Module, folder: ModelFolder, key_mapping: dict[str, str] | None = None
) -> dict[str, str]:
    """Parameter or buffer name in `model` -> its name in the weights, for those stored one to one.

    Names in files and in models differ; transformers' own renaming on loading is used.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    steps = get_model_conversion_mapping(model, key_mapping)  # type: ignore[arg-type]
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    prefix: Any = model.base_model_prefix
    state = model.state_dict()
    found = {}
    for key in sorted(folder.shapes, key=dot_natural_key):
        name, converter = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, converter = rename_source_key(key, [], [], prefix, state)
        if converter is None and name in state:
            found[name] = key
    return found


def shapes_in(
    model: nn.Module, folder: ModelFolder, key_mapping: dict[str, str] | None
) -> dict[str, tuple[int, ...]]:
    """Parameter or buffer name in `model` -> its shape in the weights, as `keys_in`."""
    return {name: folder.shapes[key] for name, key in keys_in(model, folder, key_mapping).items()}


@contextlib.contextmanager
def stored_tensors(folder: ModelFolder) -> Iterator[Callable[[str], Tensor]]:
    """Yield a function: name in the weights -> tensor, read from its file when it is asked for.

    Raises:
        CheckpointError: (of that function) the tensor cannot be read.
    """
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        places = {}
        for name in _weight_files(folder.path, None):
            file = stack.enter_context(safe_open(str(folder.path / name), "pt"))
            places |= dict.fromkeys(file.keys(), file)

        def read(key: str) -> Tensor:
            try:
                return places[key].get_tensor(key)
            except Exception as error:  # an error class of its own, without a public name
                raise damaged(folder.path, f"{key}: {error}") from None

        yield read


def check_sizes(
    model: nn.Module, folder: ModelFolder, shapes: Mapping[str, tuple[int, ...]], exact: bool
) -> None:
    """Raise CheckpointError where `model`, built but without memory yet, is not the one whose
    weights the folder holds.

    Args:
        shapes: from `shapes_in`.
        exact: whether shapes must agree; sizes that no weights account for are refused anyway.
    """
    parameters = dict(model.named_parameters())
    if exact:
        for name, parameter in parameters.items():
            if name in shapes and shapes[name] != tuple(parameter.shape):
                raise damaged(
                    folder.path,
                    f"{name} has the shape {shapes[name]} in the weights and "
                    f"{tuple(parameter.shape)} by config.json. "
                    "If another program wrote the folder, does its config.json belong to these "
                    "weights?",
                )
    stored = sum(map(_numel, folder.shapes.values()))
    loose = sum(p.numel() for name, p in parameters.items() if name not in shapes) + sum(
        b.numel() for b in model.buffers()
    )
    if loose > 16 * stored + _SLACK:
        raise damaged(
            folder.path,
            f"config.json asks for {loose:,} numbers that the weights, {stored:,} numbers, do not "
            "have.",
        )


def read_json(file: Path) -> Any:
    """Contents of a JSON file of a model folder.

    Raises:
        CheckpointError: it cannot be read, is too large, or is no JSON.
    """
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(
                f"{file} is damaged: {file.stat().st_size:,} bytes are too many for this file."
            )
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from None


def no_folder(folder: Path) -> str:
    """What to say of a path that is no model folder."""
    if folder.is_file():
        return f"{folder} is a file, not a model folder. The folder of the model comes first."
    missing = f"it has no {_CONFIG}" if folder.exists() else "it does not exist"
    message = f"{folder} is not a model folder: {missing}."
    name = str(folder)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        message += (
            f" If it is a model of the Hugging Face hub, download it first: hf download {name} "
            "--local-dir "
            f"{name.rpartition('/')[2]}; then pass that folder."
        )
    return message


def check_files(folder: Path) -> None:
    """Raise CheckpointError where a model folder holds a pipe, a device, or adapters. No file is
    opened.

    Links are followed, the hub's cache is made of them; what would hang a reader, or has no end, is
    not.
    """
    templates = folder / _TEMPLATES
    for entry in [*os.scandir(folder), *(os.scandir(templates) if templates.is_dir() else ())]:
        try:
            mode = entry.stat().st_mode
        except OSError:
            continue  # a link to nothing: missed where it is needed
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise CheckpointError(f"{entry.path} is not a regular file.")
    if (folder / _ADAPTERS).exists():
        raise CheckpointError(
            f"{folder} holds adapters ({_ADAPTERS}). Load the model they belong to, merge them "
            "into it (merge_and_unload of "
            "peft), and save the result."
        )


def _read_manifest(folder: Path) -> Manifest | None:
    file = folder / MANIFEST
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{file} is damaged or of another format: too large.")
        return Manifest.model_validate_json(file.read_bytes(), strict=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{file} is damaged or of another format: {error}") from None
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:3]
        )
        raise CheckpointError(f"{file} is damaged or of another format: {problems}") from None


def _shapes(folder: Path, variant: str | None) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for name in _weight_files(folder, variant):
        try:
            with safe_open(str(folder / name), "pt") as file:
                found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
        except Exception as error:  # an error class of its own, without a public name
            raise damaged(folder, f"{name}: {error}") from None
    return found


def _weight_files(folder: Path, variant: str | None) -> list[str]:
    """Names of the files with weights, all of them in the folder."""
    single = _WEIGHTS.replace(".", f".{variant}.", 1) if variant else _WEIGHTS
    index = f"{_INDEX.removesuffix('.json')}.{variant}.json" if variant else _INDEX
    if (folder / single).is_file():
        return [single]
    if not (folder / index).is_file():
        pickled = sorted(
            p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
        )
        why = f"it has no {single}"
        if pickled:
            why += (
                f". {pickled[0]} is pickled, which can run code when it is read: convert it to "
                "safetensors first"
            )
        raise damaged(folder, f"{why}.")
    content = read_json(folder / index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(files, dict)
        or not files
        or not all(isinstance(name, str) for name in files.values())
    ):
        raise damaged(folder, f"{index} lists no files.")
    there = set(
        os.listdir(folder)
    )  # and no path is made of a name that may be none, or too long for one
    for name in set(files.values()):
        if name not in there or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise damaged(
                folder,
                f"{index} lists {name[:100]!r}, which is no safetensors file of this folder.",
            )
    return sorted(set(files.values()))


def _check_config(
    folder: Path, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse what would take memory, run code or read other files as soon as a configuration is
    made of it.
    """
    largest_index = max(
        (
            int(part)
            for key in shapes
            for part in key.split(".")
            if part.isdecimal() and len(part) < 9
        ),
        default=0,
    )
    modules = max(1024, largest_index + 1)
    rest: list[tuple[str, Any]] = [("", config)]
    while rest:
        key, value = rest.pop()
        if isinstance(value, dict):
            rest += [
                (f"{key} implementation" if "implementation" in key else str(k), v)
                for k, v in value.items()
            ]
        elif isinstance(value, list):
            rest += [(key, v) for v in value]
        elif isinstance(value, str) and "implementation" in key and "/" in value:
            raise CheckpointError(
                f"{folder / _CONFIG} asks for code from elsewhere: {key.strip()} {value[:100]!r}."
            )
        elif isinstance(value, int | float) and not isinstance(value, bool):
            most = (
                modules
                if _LOOPED_OVER.search(key)
                else 1 << 20
                if _COUNTS.match(key)
                else _LARGEST_NUMBER
            )
            if isinstance(value, int) and abs(value) > most:
                raise damaged(
                    folder,
                    f"config.json says {key} "
                    f"{value if abs(value) < 1 << 64 else 'beyond all bounds'}.",
                )
    if config.get("transformers_weights") is not None:
        raise CheckpointError(
            f"{folder / _CONFIG} names its weights (transformers_weights); only {_WEIGHTS} is read."
        )


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
