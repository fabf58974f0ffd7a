"""`hipp export`: model folders in the formats of runtimes that serve them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from hipp_ext.cli import console

export_app = typer.Typer(
    no_args_is_help=True, help="Write a model folder in the format of another runtime."
)


@export_app.callback()
def export() -> None:
    """Write a model folder in the format of another runtime."""


@export_app.command("openvino")
def openvino(
    model: console.ModelArgument,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the graphs.")
    ],
    weight_type: Annotated[
        Literal["f32", "f16"],
        typer.Option(
            "--type", metavar="TYPE", help="Type of the weights: f32 or f16. Default: f16."
        ),
    ] = "f16",
    overwrite: console.Overwrite = False,
) -> None:
    """Write a model for OpenVINO, as a folder that openvino_genai reads.

    Llama, Mistral, Qwen2 and Qwen3 language models are written, and LLaVA around them, pruned or
    not.

    Examples:

    - `hipp export openvino ./pruned -o ./pruned-openvino`
    - `hipp export openvino ./pruned -o ./pruned-openvino --type f32`
    """
    console.require_model(model)
    from hipp_ext.integrations.openvino import export_openvino

    done = export_openvino(console.model_folder(model), out, type=weight_type, overwrite=overwrite)
    size = sum(file.stat().st_size for file in done.iterdir()) / 1e6
    kind = "VLMPipeline" if (done / "openvino_language_model.xml").exists() else "LLMPipeline"
    typer.echo(f'{done}: {size:.1f} MB, for openvino_genai.{kind}("{done}", "CPU")')
