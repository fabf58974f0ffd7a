"""Options of `hipp recover`, by the panel that they have in the help."""

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from hipp_ext.errors import HippError

# Defaults stand in the text: by themselves they would take a line each.
_option = functools.partial(typer.Option, show_default=False)
_data = functools.partial(_option, rich_help_panel="Data")
_teacher = functools.partial(_option, rich_help_panel="Teacher")
_training = functools.partial(_option, rich_help_panel="Training")
_processes = functools.partial(_option, rich_help_panel="Processes")

Data = Annotated[Path | None, _data(metavar="FILE", help="Chats, questions or texts to train on.")]
ImageFolder = Annotated[
    Path | None, _data(metavar="DIR", help="Folder of the pictures. Default: that of the data.")
]
SequenceLength = Annotated[
    int | None, _data(min=2, metavar="N", help="Tokens of a row. Default: 2048, or fewer.")
]
Packed = Annotated[bool, _data("--packed", help="Fill every row with several texts.")]
Holdout = Annotated[
    float, _data(metavar="F", help="Fraction evaluated instead of trained on. Default: 0.")
]
MeasureFiles = Annotated[
    list[Path] | None,
    _data("--measure", metavar="FILE", help="TSV to evaluate, too; given twice, one of each kind."),
]
Pope = Annotated[Path | None, _data(metavar="FILE", help="POPE-like TSV to train on instead.")]
ScienceQA = Annotated[Path | None, _data(metavar="FILE", help="Multiple-choice TSV, likewise.")]
BatchSize = Annotated[
    int, _data(min=1, metavar="N", help="Rows per process and pass (of each TSV). Default: 8.")
]

TeacherFolder = Annotated[
    Path | None,
    _teacher("--teacher", metavar="DIR", help="The dense model, or what `precompute` wrote of it."),
]
TeacherDevice = Annotated[
    str | None, _teacher(metavar="NAME", help="Where the dense model runs. Default: as the model.")
]
TeacherDtype = Annotated[
    str | None, _teacher(metavar="NAME", help="Type of its weights. Default: as stored.")
]
Temperature = Annotated[
    float, _teacher(metavar="T", help="Temperature of both distributions. Default: 1.")
]
PositionsOption = Annotated[
    str,
    _teacher(
        "--positions", metavar="WHAT", help="answers, or text (all but pictures). Default: answers."
    ),
]
TopK = Annotated[
    int | None, _teacher(min=1, metavar="K", help="Most likely tokens. Default: all tokens.")
]
CrossEntropyShare = Annotated[
    float, _teacher(metavar="F", help="Share of the labels' loss. Default: 0.")
]
HiddenShare = Annotated[
    float, _teacher(metavar="F", help="Share of the hidden states' distance. Default: 0.")
]
HiddenLayers = Annotated[
    str | None, _teacher(metavar="LIST", help="Dense layers for it: 0,5,11. Default: all.")
]

Steps = Annotated[int, _training(min=1, metavar="N", help="Optimizer steps. Default: 400.")]
Accumulation = Annotated[
    int, _training(min=1, metavar="N", help="Passes that make a step. Default: 1.")
]
TrainOption = Annotated[
    str,
    _training(
        "--train", metavar="WHAT", help="full, lora (merged at the end), norms. Default: full."
    ),
]
LoraRank = Annotated[int, _training(min=1, metavar="N", help="Rank of the adapters. Default: 16.")]
FreezeVision = Annotated[
    bool, _training("--freeze-vision", help="Leave the vision tower as it is.")
]
OptimizerName = Annotated[
    str | None,
    _training(
        "--optimizer",
        metavar="NAME",
        help="muon (with AdamW) or adamw. Default: adamw with --data, otherwise muon.",
    ),
]
Lr = Annotated[
    float | None,
    _training(
        metavar="LR",
        help="Peak learning rate of AdamW. Default: 0.0001 with --data, otherwise 0.001.",
    ),
]
MuonLr = Annotated[
    float, _training(metavar="LR", help="Peak learning rate of Muon. Default: 0.01.")
]
Schedule = Annotated[
    str, _training(metavar="NAME", help="trapezoid or cosine. Default: trapezoid.")
]
Warmup = Annotated[
    int | None, _training(min=1, metavar="N", help="Steps of it. Default: a tenth, 30 at most.")
]
PrecisionOption = Annotated[
    str,
    _training(
        "--precision", metavar="NAME", help="float32, bf16, or auto: as loaded. Default: auto."
    ),
]
GradientCheckpointing = Annotated[
    bool, _training("--gradient-checkpointing", help="Compute activations twice, to save memory.")
]
EvaluateEvery = Annotated[
    int | None,
    _training(min=1, metavar="N", help="Steps between evaluations. Default: a tenth of all."),
]
Keep = Annotated[
    str | None,
    _training(metavar="WHICH", help="best or last weights. Default: best, if evaluated."),
]
Patience = Annotated[
    int | None, _training(min=1, metavar="N", help="Stop after N evaluations without a gain.")
]
SaveEvery = Annotated[
    int, _training(min=1, metavar="N", help="Steps between checkpoints. Default: 50.")
]
Seed = Annotated[
    int, _training(metavar="N", help="Random seed of data order and dropout. Default: 0.")
]

Compression = Annotated[
    str, _processes(metavar="NAME", help="Compression of gradients: lqsgd or none. Default: lqsgd.")
]
Rank = Annotated[int, _processes(metavar="N", help="Largest rank of LQ-SGD's factors. Default: 4.")]
Bits = Annotated[int, _processes(metavar="N", help="Bits per value of LQ-SGD: 4 or 8. Default: 8.")]
Transport = Annotated[
    str, _processes(metavar="NAME", help="auto, all_gather or all_to_all. Default: auto.")
]
LocalSteps = Annotated[
    int | None,
    _processes(
        metavar="N", help="Steps alone between two averages (DiLoCo). Default: average every step."
    ),
]
OuterLr = Annotated[
    float, _processes(metavar="X", help="Learning rate of local steps' average. Default: 1.")
]
OuterMomentum = Annotated[
    float, _processes(metavar="X", help="Momentum of local steps' average. Default: 0.")
]
Sharding = Annotated[
    str,
    _processes(metavar="NAME", help="fsdp: spread the model over the processes. Default: none."),
]


def with_recipe(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with an optimizer and a learning rate: gentle ones for a user's data, which a
    pretrained model is recovered on; for the built-in questions those of the tiny model.
    """
    optimizer, lr = ("adamw", 1e-4) if given["data"] else ("muon", 1e-3)
    chosen = {"optimizer": given["optimizer"] or optimizer}
    chosen["lr"] = lr if given["lr"] is None else given["lr"]
    return given | chosen | {"hidden_layers": _layers(given["hidden_layers"])}


def _layers(given: str | None) -> tuple[int, ...] | None:
    """The numbers in a list such as "0,5,11"."""
    if given is None:
        return None
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise HippError(f"--hidden-layers {given}: numbers with commas between are needed.")
    return tuple(map(int, parts))
