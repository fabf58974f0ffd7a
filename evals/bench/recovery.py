"""`hipp bench recovery`: plan, prune 40%, recover on two processes, evaluate on the test and the validation split.

Two plans: the planner's for a preference, and every group losing the same share (both by WandaSP). Recovery is the command a
user would type, torchrun -m hipp_ext recover, on the testbed's training data: with LQ-SGD, and once with DDP's own all-reduce
to compare. The recipe was not chosen on the validation split. Finished parts in the folder are kept, so that an interrupted
bench goes on.
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
RUNS = (("planner", "lqsgd", 150), ("planner", "none", 150), ("uniform", "lqsgd", 400))  # plan, compression, steps
SPLITS = ("test", "validation")
WISH = (0.4, 0.4, 0.2)


def run(folder: Path, rank: int = 4, bits: int = 8, save: bool = False) -> dict[str, Any]:
    """Make, recover and measure the models in `folder`; returns and prints the result. Percent, standard errors in points."""
    torch.set_num_threads(1)
    model, processor = testbed.load()
    asked = {split: [testbed.questions(task, split) for task in ("POPE", "ScienceQA")] for split in SPLITS}
    evaluators = {split: Evaluator(model, processor, *tasks) for split, tasks in asked.items()}

    def measure(name: str, model: Any, **more: Any) -> dict[str, Any]:
        row = {split: _accuracies(evaluators[split].scores(model), asked[split][0]) for split in SPLITS} | more
        print(name, row, flush=True)
        return row

    rows = {"dense": measure("dense", model)}
    for plan, compression, steps in RUNS:
        before, after = folder / f"{plan}-pruned", folder / f"{plan}-{compression}"
        if not before.exists():
            save_pruned(prune(model, pruning_plan(plan, model, processor)), before, processor)
        if f"{plan}, pruned" not in rows:
            rows[f"{plan}, pruned"] = measure(f"{plan}, pruned", load_pruned(before))
        if not after.exists():
            _recover(before, after, steps, compression, rank, bits)
        recovered = load_pruned(after)
        more = {"pruning_ratio": recovered.hipp_plan.pruning_ratio, "steps": steps}
        if compression == "lqsgd":
            more["bytes"] = _bytes(after.with_name(after.name + ".recover"))
        rows[f"{plan}, {compression}"] = measure(f"{plan}, {compression}", recovered, **more)
    values = {"rows": rows, "processes": 2, "rank": rank, "bits": bits, "seed": 0, "preference": WISH}
    values["questions"] = {s: {"POPE": len(pope), "ScienceQA": len(choice)} for s, (pope, choice) in asked.items()}
    return report("recovery", "hipp bench recovery", values, save)


def _accuracies(scores: Any, pope: Any) -> dict[str, Any]:
    pictures = [str(q.scene) for q in pope]
    truth, kinds = [q.answer for q in pope], [q.category for q in pope]
    overall = pope_scores(scores["pope"].answers, truth, kinds, pictures)["vlmeval"]["overall"]
    return {
        "POPE": [overall.accuracy, overall.accuracy_se], "POPE yes_rate": overall.yes_rate,
        "ScienceQA": [scores["choice"].accuracy, scores["choice"].accuracy_se],
    }  # fmt: skip


def pruning_plan(name: str, model: Any, processor: Any) -> PruningPlan:
    """The planner's for the wish, or every group losing the same share, ranked by WandaSP."""
    if name == "planner":
        return HiPPPlanner(Preference(*WISH), pruning_ratio=RATIO).plan(model, processor=processor)
    groups = find_groups(model)
    scores = WandaSP()(model, testbed.calibration_batches(processor))
    return plan_from_counts(groups, keep_counts(groups, [0.0] * len(groups), RATIO), scores)


def _recover(before: Path, after: Path, steps: int, compression: str, rank: int, bits: int) -> None:
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
    options = ["-o", after, "--steps", steps, "--compression", compression, "--rank", rank, "--bits", bits]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, *map(str, [before, *options])], check=True, env=environment)


def _bytes(checkpoints: Path) -> dict[str, int]:
    """What rank 0 sent, and what fp32 all-reduce would have sent."""
    file = next(checkpoints.glob("step-*/lqsgd.rank0.safetensors"))
    with safe_open(file, "pt") as stored:
        counts = json.loads(stored.metadata()["lqsgd"])["counts"]
    return {"sent": counts["bytes_sent"], "fp32": counts["dense_bytes"]}
