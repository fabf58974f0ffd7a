"""Which runtimes serve a model folder as it is, and why the others do not."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hipp_ext.integrations import llama_cpp_refusals, openvino_refusals, vllm
from hipp_ext.model_folder import read_folder
from hipp_ext.surgery.layer_config import quiet_width_warnings, set_layers

Runtime = Literal["transformers", "hipp-ext", "vllm", "llama.cpp", "openvino"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one runtime says of a folder.

    Attributes:
        runtime: the runtime; "hipp-ext" is transformers through `load_pruned`.
        reasons: why it cannot serve the folder; empty if it can.
        command: how it is served.
    """

    runtime: Runtime
    reasons: tuple[str, ...]
    command: str


COMMANDS: dict[Runtime, str] = {
    "transformers": 'AutoModel...from_pretrained("{folder}")',
    "hipp-ext": 'hipp_ext.load_pruned("{folder}")',
    "vllm": 'pip install "hipp-ext[vllm]"; vllm serve {folder}',
    "llama.cpp": "hipp export gguf {folder} -o model.gguf",
    "openvino": "hipp export openvino {folder} -o openvino",
}


def check_serving(folder: str | Path) -> list[Verdict]:
    """A verdict for every runtime, from the configuration and the manifest; no weights are read.

    An unpruned model of a family that hipp-ext does not know may be served by a runtime all the
    same: reasons are about what pruning leaves.

    Raises:
        CheckpointError: the folder is no model, or it is incomplete or damaged.
    """
    from transformers import AutoConfig

    read_folder(folder)
    quiet_width_warnings()
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    found: dict[Runtime, Sequence[str]] = {
        "transformers": _stock_refusals(config, Path(folder)),
        "hipp-ext": (),
        "vllm": vllm.refusals(config, folder),
        "llama.cpp": llama_cpp_refusals.refusals(config),
        "openvino": openvino_refusals.refusals(config),
    }
    return [
        Verdict(
            runtime=runtime, reasons=tuple(reasons), command=COMMANDS[runtime].format(folder=folder)
        )
        for runtime, reasons in found.items()
    ]


PRUNED_REFUSALS: dict[str, Callable[[Any], tuple[str, ...]]] = {
    "vllm": vllm.refusals,
    "gguf": llama_cpp_refusals.refusals,
}


def pruned_refusals(config: Any, runtime: Literal["vllm", "gguf"]) -> tuple[str, ...]:
    """Why a runtime could not serve a model of this configuration once its layers differ.

    Args:
        config: configuration of the dense model.
        runtime: as in `hipp plan --serve`.
    """
    quiet_width_warnings()
    return PRUNED_REFUSALS[runtime](_uneven(config))


def refusals_of_plans(config: Any) -> dict[Runtime, dict[str, tuple[str, ...]]]:
    """Runtime -> why it could not serve what a plan leaves of a model, by the shape of the plan.

    Shapes are "free" (layers differ) and "alike" (uniform widths, or whole layers that go). A
    reason of the latter is about the family; whether a runtime knows the dense model is its own
    matter.

    Args:
        config: configuration of the dense model.
    """
    quiet_width_warnings()
    uneven, nowhere = _uneven(config), Path()
    both = {"free": uneven, "alike": config}
    by_config: dict[Runtime, Callable[[Any], Sequence[str]]] = {
        "transformers": lambda c: _stock_refusals(c, nowhere),
        "hipp-ext": lambda c: (),
        "vllm": vllm.refusals,
        "llama.cpp": llama_cpp_refusals.refusals,
        "openvino": openvino_refusals.refusals,
    }
    return {
        runtime: {shape: tuple(refuse(c)) for shape, c in both.items()}
        for runtime, refuse in by_config.items()
    }


def _uneven(config: Any) -> Any:
    """The configuration of the model once its layers differ."""
    uneven = copy.deepcopy(config)
    text = uneven.get_text_config()
    if not getattr(text, "is_heterogeneous", False):
        set_layers(text, {0: {"skip": ["mlp"]}})
    return uneven


def _stock_refusals(config: Any, folder: Path) -> tuple[str, ...]:
    """Why stock `from_pretrained` builds another model than the folder holds."""
    reasons = []
    if getattr(config.get_text_config(), "is_heterogeneous", False):
        reasons.append(
            "its layers differ, which transformers reads but does not build; plan with "
            "--serve stock, or save what pad_to_uniform(model) returns"
        )
    if pruned := vllm.pruned_vision_blocks(config, folder):
        reasons.append(f"its {vllm.pruned_parts(pruned)} was pruned ({len(pruned)} blocks)")
    return tuple(reasons)
