"""Plan, prune 40%, recover on two processes, evaluate on the test and the validation split.

The planner makes the plan for a preference. Recovery is the command that a user would type,
torchrun -m hipp_ext recover, on the testbed's training data: with LQ-SGD, and with DDP's own
all-reduce for comparison. The recipe was not chosen on the validation split. Finished parts in the
folder are kept, so an interrupted study continues.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hipp_ext import HiPPPlanner, Preference, PruningPlan, load_pruned, prune, save_pruned, testbed
from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.evals.studies.measuring import Save, pope_by_split, report, run_command
from hipp_ext.files.sealed import unseal

RATIO = 0.4
COMPRESSIONS, STEPS = ("lqsgd", "none"), 150
SPLITS = ("test", "validation")
PREFERENCE = (0.4, 0.4, 0.2)


def run(
    out: Annotated[
        Path, typer.Option(help="Folder of the models; finished parts are kept.")
    ] = Path("recovery"),
    rank: Annotated[int, typer.Option(min=1, help="Largest rank of LQ-SGD's factors.")] = 4,
    bits: Annotated[int, typer.Option(help="Bits per value that LQ-SGD sends.")] = 8,
    save: Save = False,
) -> dict[str, Any]:
    """Prune 40% of the testbed's model and recover it on two processes, with LQ-SGD and without.

    Accuracies are in percent, standard errors in percentage points.

    Example: `python -m hipp_ext.evals.studies.recovery --out recovery`
    """
    torch.set_num_threads(1)
    model, processor = testbed.load()
    asked = {s: [testbed.questions(task, s) for task in testbed.TASKS] for s in SPLITS}
    evaluators = {split: Evaluator(model, processor, *tasks) for split, tasks in asked.items()}

    def measure(name: str, model: Any, **more: Any) -> dict[str, Any]:
        row = {
            split: _accuracies(evaluators[split].scores(model), asked[split][0]) for split in SPLITS
        } | more
        print(name, row, flush=True)
        return row

    before = out / "pruned"
    if not before.exists():
        save_pruned(prune(model, pruning_plan(model, processor)), before, processor)
    pruned = load_pruned(before)
    ratio = pruned.hipp_plan.pruning_ratio
    rows = {
        "dense": measure("dense", model),
        "pruned": measure("pruned", pruned, pruning_ratio=ratio),
    }
    for compression in COMPRESSIONS:
        after = out / compression
        if not after.exists():
            _recover(before, after, compression, rank, bits)
        more = {"bytes": _bytes(out / f"{compression}.recover")} if compression == "lqsgd" else {}
        rows[compression] = measure(compression, load_pruned(after), steps=STEPS, **more)
    options = {"processes": 2, "rank": rank, "bits": bits, "seed": 0, "preference": PREFERENCE}
    counts = {s: dict(zip(testbed.TASKS, map(len, q), strict=True)) for s, q in asked.items()}
    return report("recovery", {"rows": rows, **options, "questions": counts}, save)


def _accuracies(scores: Any, pope: Any) -> dict[str, Any]:
    overall = pope_by_split(scores, pope)["overall"]
    return {
        "POPE": [overall.accuracy, overall.accuracy_se],
        "POPE yes_rate": overall.yes_rate,
        "ScienceQA": [scores["choice"].accuracy, scores["choice"].accuracy_se],
    }


def pruning_plan(model: Any, processor: Any) -> PruningPlan:
    """The untrained planner's plan for PREFERENCE."""
    planner = HiPPPlanner(Preference(*PREFERENCE), pruning_ratio=RATIO)
    return planner.plan(model, processor=processor)


def _recover(before: Path, after: Path, compression: str, rank: int, bits: int) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "hipp_ext"]
    chosen = f"--steps {STEPS} --compression {compression} --rank {rank} --bits {bits}".split()
    command = [sys.executable, *launch, "recover", str(before), "-o", str(after), *chosen]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment)


def _bytes(checkpoints: Path) -> dict[str, int]:
    """Bytes that rank 0 sent, and that fp32 all-reduce would have sent."""
    file = next(checkpoints.glob("step-*/lqsgd.rank0.safetensors"))
    counts = unseal(file)[1]["counts"]
    return {"sent": counts["bytes_sent"], "fp32": counts["dense_bytes"]}


if __name__ == "__main__":
    run_command(run)
