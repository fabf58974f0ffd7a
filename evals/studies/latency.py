"""What pruning saves a model of LLaVA-1.5's proportions: time, memory and FLOPs of a generation."""

import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors.torch import save_file

from hipp_ext.budget import keep_counts
from hipp_ext.evals import latency
from hipp_ext.evals.generation import Workload
from hipp_ext.evals.studies.measuring import Save, report, run_command
from hipp_ext.evals.studies.shapes import noise, random_llava
from hipp_ext.groups import find_groups
from hipp_ext.scorers import Magnitude
from hipp_ext.surgery.checkpoint import save_pruned
from hipp_ext.surgery.prune import prune
from hipp_ext.units import plan_from_counts


def run(
    pruning_ratio: Annotated[float, typer.Option(help="Fraction removed, uniformly.")] = 0.3,
    hidden: Annotated[int, typer.Option(help="Width, a multiple of 128.")] = 1024,
    layers: Annotated[int, typer.Option(min=1, help="Number of layers.")] = 8,
    repeats: Annotated[int, typer.Option(min=2, help="Runs that count, after two warm-ups.")] = 9,
    device: Annotated[str | None, typer.Option(help="Default: the GPU if there is one.")] = None,
    save: Save = False,
) -> dict[str, Any]:
    """Measure random weights of LLaVA-1.5's shape, dense and uniformly pruned.

    `hipp latency MODEL PRUNED` measures models of your own.

    Example: `python -m hipp_ext.evals.studies.latency`
    """
    model, workload = random_llava(hidden, layers), Workload(repeats=repeats)
    groups = find_groups(model)
    plan = plan_from_counts(groups, keep_counts(groups, None, pruning_ratio), Magnitude()(model))
    (batch,) = noise(workload.rows, at_once=workload.rows)
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the models have no processor, and need none
        folder, inputs = Path(temporary), Path(temporary) / "inputs.safetensors"
        save_file(batch, inputs)
        models = {
            "dense": save_pruned(model, folder / "dense"),
            "pruned": save_pruned(prune(model, plan), folder / "pruned"),
        }
        found = latency.run(models, (), workload, inputs=inputs, device=device)
    shape = {"hidden": hidden, "layers": layers, "tokens": batch["input_ids"].shape[1]}
    shape |= {"pruning_ratio": pruning_ratio}
    values = {"load": found["load"], "shape": shape, "models": found["models"]}
    return report("latency", values, save, device=device)


if __name__ == "__main__":
    run_command(run)
