"""What the commands share: options, and how they print and write."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from hipp_ext.errors import HippError, OutputExistsError
from hipp_ext.files import write_atomic

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A transformers model folder, or `testbed`.")
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1, ...; default: the GPU if there is one."),
]
Devices = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu, cuda, cuda:1, ..., or auto: spread over all GPUs; default: the GPU if there is one.",
    ),
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: as stored.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output path.")]


def say(line: str) -> None:
    typer.echo(line)


def model_folder(model: str) -> str:
    if model != "testbed":
        return model
    from hipp_ext.testbed import WEIGHTS

    return str(WEIGHTS)


def require_apart(out: Path, *inputs: Path) -> None:
    """Raise OutputExistsError where replacing the folder `out` would take an input with it that lies somewhere inside.

    (A model that is replaced itself by its smaller self is what was asked for.)
    """
    for file in inputs:
        if out.resolve() in file.resolve().parents:
            raise OutputExistsError(
                f"{out} holds {file}, which would go with it. Choose another name."
            )


def check_dtype(dtype: str | None) -> None:
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise HippError(f"--dtype {dtype}: float32, bfloat16 or float16 is needed.")


def load_model(
    model: str, device: str | None = "cpu", dtype: str | None = None, *, spread: bool = False
) -> tuple[Any, Any]:
    """Model and processor of a folder; device None: the GPU if there is one.

    With `spread`, "auto" is a device too: all GPUs, as transformers' device_map spreads a model over them.
    """
    import torch

    from hipp_ext.calibration import find_processor
    from hipp_ext.groups import check_loaded
    from hipp_ext.surgery.checkpoint import load_pruned, resolve_device

    check_dtype(dtype)
    place: Any = (
        {"device_map": "auto"}
        if spread and device == "auto"
        else {"device": resolve_device(device)}
    )
    if "device_map" in place:
        _check_spread()
    loaded = load_pruned(
        model_folder(model), dtype=getattr(torch, dtype) if dtype else None, **place
    )
    check_loaded(loaded)
    return loaded, find_processor(loaded)


def _check_spread() -> None:
    from importlib.util import find_spec

    if find_spec("accelerate") is None:
        raise HippError("--device auto needs accelerate: pip install accelerate")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise HippError(
            "--device auto gives one model all GPUs; under torchrun every process needs one of its own."
        )


def own_device() -> str:
    """The GPU that `torchrun` meant for this process, if there are GPUs."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def print_wide(table: Any) -> None:
    """A rich table in full: where the terminal is too narrow, its lines wrap, and no number is cut."""
    from rich.console import Console

    console = Console(markup=False)
    width = console.measure(table, options=console.options.update(width=1000)).maximum
    (
        console if console.width >= width else Console(width=width, soft_wrap=True, markup=False)
    ).print(table)


def write_json(path: Path, values: dict[str, Any]) -> None:
    import json

    write_atomic(path, json.dumps(values, indent=1, allow_nan=False) + "\n")
