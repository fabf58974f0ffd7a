"""What the commands share: arguments, and how they check and load a model."""

import functools
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hipp_ext.errors import CheckpointError, DataError, HippError, OutputExistsError
from hipp_ext.files.untrusted import MAX_COMMAND

hardware_option = functools.partial(typer.Option, rich_help_panel="Hardware", metavar="NAME")
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder of a transformers model, or `testbed`.")
]
Device = Annotated[
    str | None, hardware_option(help="cpu, cuda, cuda:1, ... Default: the GPU if there is one.")
]
Devices = Annotated[
    str | None,
    hardware_option(
        help="cpu, cuda, cuda:1, ..., or auto (all GPUs). Default: the GPU if there is one."
    ),
]
Dtype = Annotated[
    str | None, hardware_option(help="float32, bfloat16 or float16. Default: as stored.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what exists at the output path.")
]


def command_line() -> str:
    """The command line of this process, for results that say how they were made.

    A very long one is cut, and what is no text becomes question marks: files can hold it.
    """
    whole = shlex.join(["hipp", *sys.argv[1:]])
    return whole.encode(errors="replace").decode()[:MAX_COMMAND]


def model_folder(model: str) -> str:
    """The path of a model argument."""
    if model != "testbed":
        return model
    from hipp_ext.testbed import WEIGHTS

    return str(WEIGHTS)


def named_folders(models: Sequence[str]) -> dict[str, str]:
    """Name of each model argument -> its path.

    Raises:
        DataError: two have one name.
    """
    folders = {Path(m).resolve().name or m: model_folder(m) for m in models}
    if len(folders) < len(models):
        raise DataError(f"two folders of one name: {', '.join(models)}. Rename one")
    return folders


def require_model(model: str) -> None:
    """Raise CheckpointError unless `model` is a model folder. Called first, to catch typos."""
    folder = Path(model_folder(model))
    if not (folder / "config.json").is_file():
        from hipp_ext.model_folder import no_folder

        raise CheckpointError(no_folder(folder))


def require_apart(out: Path, *inputs: Path) -> None:
    """Raise OutputExistsError if an input lies inside the folder `out`, which would be replaced.

    An input that is `out` itself passes: replacing a model by its pruned version is allowed.
    """
    for file in inputs:
        if out.resolve() in file.resolve().parents:
            raise OutputExistsError(
                f"{out} holds the input {file}, and replacing it would delete both. "
                "Choose another output path."
            )


def require_run(out: Path) -> None:
    """Raise unless a run can begin in the folder `out`, or may have begun there: it has no
    --overwrite, and goes on instead.

    Raises:
        OutputExistsError: it holds something else.
        WriteError: it cannot be written.
    """
    from hipp_ext.files import require_new
    from hipp_ext.runs import IDENTITY

    if (out / IDENTITY).is_file():
        return
    try:
        require_new(out)
    except OutputExistsError:
        raise OutputExistsError(
            f"{out} exists, and no run began there that could go on. Choose another name."
        ) from None


def check_dtype(dtype: str | None, option: str = "--dtype") -> None:
    """Raise HippError unless `dtype` is None or the name of a supported data type."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise HippError(f"{option} {dtype}: expected float32, bfloat16 or float16.")


def load_model(
    model: str, device: str | None = "cpu", dtype: str | None = None, *, spread: bool = False
) -> tuple[Any, Any]:
    """The model and the processor of a folder.

    Args:
        model: a folder, or "testbed".
        device: name of a device; None: the GPU if there is one. With `spread`, "auto" spreads
            the model over all GPUs by transformers' device_map.
        dtype: name of a data type; None: as stored.
        spread: whether "auto" is allowed.
    """
    import torch

    from hipp_ext.calibration import find_processor
    from hipp_ext.groups import check_loaded
    from hipp_ext.surgery.checkpoint import load_pruned, resolve_device

    check_dtype(dtype)
    if spread and device == "auto":
        _check_spread()
        placement: dict[str, Any] = {"device_map": "auto"}
    else:
        placement = {"device": resolve_device(device)}
    loaded = load_pruned(
        model_folder(model), dtype=getattr(torch, dtype) if dtype else None, **placement
    )
    check_loaded(loaded)
    return loaded, find_processor(loaded)


def _check_spread() -> None:
    from importlib.util import find_spec

    if find_spec("accelerate") is None:
        raise HippError("--device auto needs accelerate: pip install accelerate")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise HippError(
            "--device auto spreads one model over all GPUs. Under torchrun every process needs "
            "a GPU of its own: omit --device."
        )


def own_device() -> str:
    """The GPU that torchrun assigned to this process; "cpu" without GPUs."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
