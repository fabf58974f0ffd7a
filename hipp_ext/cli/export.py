"""`hipp export`: model folders in the formats of runtimes that serve them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from hipp_ext.cli import console, output

export_app = typer.Typer(
    no_args_is_help=True, help="Write a model folder in the format of another runtime."
)


@export_app.callback()
def export() -> None:
    """Write a model folder in the format of another runtime."""


@export_app.command("gguf")
def gguf(
    model: console.ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The GGUF file.")],
    weight_type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"],
        typer.Option(
            "--type",
            metavar="TYPE",
            help="Type of the weights: f32, f16, bf16 or q8_0 (matrices whose rows are no multiple "
            "of 32 long then stay in f16). llama-quantize of llama.cpp makes other types of f16.",
        ),
    ] = "f16",
    tokenizer_from: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Take the tokenizer of this GGUF file. Default: make it from the tokenizer in the "
            "folder.",
        ),
    ] = None,
    mmproj: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write the vision tower and projector of LLaVA-1.5 to this file. Default: "
            "the mmproj of the unpruned model goes on working.",
        ),
    ] = None,
    overwrite: console.Overwrite = False,
) -> None:
    """Write a model for llama.cpp, Ollama and LM Studio, as a GGUF file.

    Llama, Mistral and Qwen2 language models are written, and the language towers of
    vision-language models around them, pruned or not.

    Examples:

    - `hipp export gguf ./pruned -o pruned.gguf`
    - `hipp export gguf ./pruned -o pruned.gguf --type q8_0 --tokenizer-from dense.gguf`
    - `hipp export gguf ./llava-pruned -o llava.gguf --mmproj mmproj.gguf`
    - `llama-cli -m pruned.gguf -p "The capital of France is"`
    """
    console.require_model(model)
    from hipp_ext.integrations.llama_cpp import export_gguf

    done = export_gguf(
        console.model_folder(model),
        out,
        type=weight_type,
        tokenizer_from=tokenizer_from,
        mmproj=mmproj,
        overwrite=overwrite,
        progress=output.shows_progress(),
    )
    for remark in done.notes:
        output.note(remark)
    output.say(
        f"{done.path}: {done.parameters / 1e6:.2f}M parameters, {done.bytes / 1e6:.1f} MB, "
        f"architecture {done.architecture}, {weight_type}"
    )


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
    output.say(f'{done}: {size:.1f} MB, for openvino_genai.{kind}("{done}", "CPU")')
