"""What a fit costs on random weights of LLaVA-1.5's shape: seconds, memory, and hours in all.

Pictures and questions are noise with as many tokens as LLaVA-1.5's: six questions about one
picture, as in POPE, and as many with a picture each, as in ScienceQA. Their content changes no time
except the policy's, which learns from rewards: it is timed in a whole fit whose evaluator reads the
reward off the plan.
"""

import statistics
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hipp_ext.answers import AnswerLogits
from hipp_ext.budget import keep_counts
from hipp_ext.cli.console import check_dtype
from hipp_ext.evals.measuring import timed
from hipp_ext.evals.studies.measuring import Save, report, run_command
from hipp_ext.evals.studies.shapes import (
    Hidden,
    InDtype,
    Layers,
    OnDevice,
    OutFile,
    check_hidden,
    noise,
    random_llava,
)
from hipp_ext.groups import Group, find_groups
from hipp_ext.planner import FitSettings, HiPPPlanner
from hipp_ext.planner.state import measure_signals
from hipp_ext.preference import Preference
from hipp_ext.projections import inputs_of, projection
from hipp_ext.surgery.checkpoint import resolve_device
from hipp_ext.surgery.prune import prune
from hipp_ext.surgery.slices import sliced
from hipp_ext.units import plan_from_counts

ROWS_PER_PICTURE = 6  # POPE's questions about one picture
CALIBRATION_BATCH = 16  # rows of one forward pass, as in `hipp fit`
RATIOS = (0.15, 0.3, 0.45)  # pruning ratios of the plans that are timed


@dataclass(frozen=True, kw_only=True)
class FitCostSize:
    """What is measured.

    Attributes:
        hidden: width of the language tower; 4096 makes the 7B model.
        layers: number of layers of the language tower; 32 make the 7B model.
        questions: number of questions per task.
        calibration: number of calibration rows.
        fit: settings of the fit whose cost is estimated.
    """

    hidden: int = 512
    layers: int = 4
    questions: int = 24
    calibration: int = 64
    fit: FitSettings = FitSettings()


def run(
    size: FitCostSize | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    save: bool = False,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure signals, evaluations, learning and surgery one after another; also prints the result.

    Args:
        size: size of the model and of the fit.
        device: torch device; None: the GPU if there is one.
        dtype: name of a torch dtype; None: float32.
        save: write the result to results/fit_cost.json.
        out: also write the result to this file.
    """
    size, place = size or FitCostSize(), resolve_device(device)
    meter = partial(timed, place)
    kind = getattr(torch, dtype or "float32")
    model, building = meter(
        lambda: random_llava(size.hidden, size.layers, whole=True, device=place, dtype=kind)
    )
    groups, calibration = find_groups(model), noise(size.calibration, at_once=CALIBRATION_BATCH)
    signals, spent_signals = meter(lambda: measure_signals(model, calibration))
    asked = [
        *noise(size.questions, shared=ROWS_PER_PICTURE, seed=1),
        *noise(size.questions, seed=2),
    ]
    answers, spent_inputs = meter(lambda: AnswerLogits(model, asked))
    answers(model)  # warm-up
    _, spent_dense = meter(lambda: answers(model))
    with FlopCounterMode(display=False) as counter:
        answers(model)
    teraflops = counter.get_total_flops() / 1e12
    spent_plans = []
    with sliced(model, groups, signals.scores) as shrink:

        def evaluate(ratio: float) -> None:
            shrink(keep_counts(groups, None, ratio))
            answers(model)

        for ratio in RATIOS:
            evaluate(ratio)  # kernels are chosen by shape
            spent_plans.append(meter(lambda r=ratio: evaluate(r))[1])
    planner = HiPPPlanner(Preference(1, 1, 1))
    planner.signals = signals
    _, spent_learning = meter(
        lambda: planner.fit(model, _RewardOfShape(groups), size.fit, progress=False)
    )
    plan = plan_from_counts(groups, keep_counts(groups, None, 0.3), signals.scores)
    small, spent_surgery = meter(lambda: prune(model, plan, inplace=True))
    plan_seconds = statistics.fmean(spent["seconds"] for spent in spent_plans)
    once = spent_signals["seconds"] + spent_inputs["seconds"] + spent_learning["seconds"]
    rows_bytes = (
        sum(int(b["attention_mask"].sum()) for b in asked)
        * size.hidden
        * next(small.parameters()).element_size()
    )
    values = {
        "size": asdict(size) | {"fit": {"evaluations": size.fit.evaluations}},
        "dtype": dtype or "float32",
        "parameters": sum(g.parameters for g in groups),
        "building": building,
        "signals": spent_signals,
        "inputs of the language tower": spent_inputs,
        "activations_mib": rows_bytes / 2**20,
        "evaluation, dense": spent_dense
        | {"teraflops": teraflops, "teraflops_per_second": teraflops / spent_dense["seconds"]},
        "evaluation, pruned": {
            str(ratio): spent for ratio, spent in zip(RATIOS, spent_plans, strict=True)
        },
        "learning": spent_learning,
        "surgery": spent_surgery,
        "hours of a fit": (once + size.fit.evaluations * plan_seconds) / 3600,
    }
    return report("fit_cost", values, save, device=place, out=out)


def main(
    hidden: Hidden = 512,
    layers: Layers = 4,
    questions: Annotated[int, typer.Option(min=1, help="Questions per task.")] = 24,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the fit, 12 plans each.")] = 20,
    device: OnDevice = None,
    dtype: InDtype = "float32",
    out: OutFile = None,
    save: Save = False,
) -> None:
    """Estimate what a fit costs: signals, evaluations, learning, surgery, memory, and hours in all.

    Examples:

    `python -m hipp_ext.evals.studies.fit_cost`

    `python -m hipp_ext.evals.studies.fit_cost --hidden 4096 --layers 32 --questions 192
    --dtype bfloat16` is LLaVA-1.5-7B, for a GPU
    """
    check_dtype(dtype)
    check_hidden(hidden)
    size = FitCostSize(
        hidden=hidden, layers=layers, questions=questions, fit=FitSettings(steps=steps)
    )
    run(size, device=device, dtype=dtype, save=save, out=out)


class _RewardOfShape:
    """An evaluator that takes no time: rewards fall with the square of each layer's loss."""

    def __init__(self, groups: tuple[Group, ...]):
        self.groups = groups

    def __call__(self, model: nn.Module) -> dict[str, float]:
        lost = [
            1 - inputs_of(projection(model, g.consumer)) / (g.width * g.columns)
            for g in self.groups
        ]
        early, late = lost[: len(lost) // 2], lost[len(lost) // 2 :]
        return {
            "utility": 1 - statistics.fmean(x * x for x in early),
            "robustness": 1 - statistics.fmean(x * x for x in late),
        }


if __name__ == "__main__":
    run_command(main)
