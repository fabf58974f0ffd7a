"""`hipp bench recovery`: plan, prune 40%, recover on two processes with LQ-SGD, evaluate on the test split.

Two plans: every group loses the same share (WandaSP), and the planner's for a preference. Recovery is the command a user would
type, torchrun -m hipp_ext recover, on the testbed's training data; where the uniform plan took attention heads, a second
round with fresh learning rates follows. Finished parts in the folder are kept, so that an interrupted bench goes on.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from hipp_ext.evals.bench.measuring import report
from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.evals.pope import pope_scores
from safetensors import safe_open

from hipp_ext import HiPPPlanner, Preference, PruningPlan, load_pruned, prune, save_pruned, testbed
from hipp_ext.budget import keep_counts
from hipp_ext.groups import find_groups
from hipp_ext.masks import plan_from_counts
from hipp_ext.scorers import WandaSP

RATIO = 0.4
ROUNDS = {"uniform": (400, 150), "planner": (150,)}  # steps of each round, from where the last one ended
WISH = (0.4, 0.4, 0.2)


def run(folder: Path, rank: int = 4, bits: int = 8, save: bool = False) -> dict[str, Any]:
    """Make, recover and measure both models in `folder`; returns and prints the result. Percent, standard errors in points."""
    torch.set_num_threads(1)
    model, processor = testbed.load()
    pope, choice = testbed.questions("POPE", "test"), testbed.questions("ScienceQA", "test")
    evaluator = Evaluator(model, processor, pope, choice)

    def measure(model: Any) -> dict[str, Any]:
        scores = evaluator.scores(model)
        pictures = [str(q.scene) for q in pope]
        split = pope_scores(scores["pope"].answers, [q.answer for q in pope], [q.category for q in pope], pictures)["vlmeval"]
        overall = split["overall"]
        row = {"POPE": [overall.accuracy, overall.accuracy_se], "POPE yes_rate": overall.yes_rate}
        return row | {"ScienceQA": [scores["choice"].accuracy, scores["choice"].accuracy_se]}

    rows: dict[str, Any] = {"dense": measure(model)}
    for name, rounds in ROUNDS.items():
        before = folder / f"{name}-pruned"
        if not before.exists():
            save_pruned(prune(model, _plan(name, model, processor)), before, processor)
        rows[f"{name}, pruned"] = measure(load_pruned(before))
        for number, steps in enumerate(rounds, 1):
            after = folder / f"{name}-{number}"
            if not after.exists():
                _recover(before, after, steps, rank, bits)
            recovered, before = load_pruned(after), after
            row = measure(recovered) | {"pruning_ratio": recovered.hipp_plan.pruning_ratio, "steps": steps}
            row["bytes"] = _bytes(after.with_name(after.name + ".recover"))
            rows[f"{name}, round {number}"] = row
            print(name, rows[f"{name}, pruned"], row, flush=True)
    values = {"rows": rows, "processes": 2, "rank": rank, "bits": bits, "seed": 0, "preference": WISH}
    values["questions"] = {"POPE": len(pope), "ScienceQA": len(choice)}
    return report("recovery", "hipp bench recovery", values, save)


def _plan(name: str, model: Any, processor: Any) -> PruningPlan:
    if name == "planner":
        return HiPPPlanner(Preference(*WISH), pruning_ratio=RATIO).plan(model, processor=processor)
    return uniform_plan(model, processor)


def uniform_plan(model: Any, processor: Any) -> PruningPlan:
    """Every group loses the same share, ranked by WandaSP."""
    groups = find_groups(model)
    scores = WandaSP()(model, testbed.calibration_batches(processor))
    return plan_from_counts(groups, keep_counts(groups, [0.0] * len(groups), RATIO), scores)


def _recover(before: Path, after: Path, steps: int, rank: int, bits: int) -> None:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "hipp_ext",
        "recover",
    ]
    options = ["-o", str(after), "--steps", str(steps), "--rank", str(rank), "--bits", str(bits)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, str(before), *options], check=True, env=environment)


def _bytes(checkpoints: Path) -> dict[str, int]:
    """What rank 0 sent, and what fp32 all-reduce would have sent."""
    file = next(checkpoints.glob("step-*/lqsgd.rank0.safetensors"))
    with safe_open(file, "pt") as stored:
        counts = json.loads(stored.metadata()["lqsgd"])["counts"]
    return {"sent": counts["bytes_sent"], "fp32": counts["dense_bytes"]}
