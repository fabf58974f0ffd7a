"""`hipp bench comm --testbed`: recovering a testbed model from the planner's 40% plan, gradients averaged in different ways.

Two simulated workers, AdamW, 11 rows a worker and step. Like data: both learn from everything. Unlike data: one sees pictures
only, the other facts only. Measured on the test split.
"""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from hipp_ext import prune, testbed
from hipp_ext.calibration import Batch
from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.evals.studies.comm_accuracy import print_rows, summary
from hipp_ext.evals.studies.comm_baselines import Averager, methods
from hipp_ext.evals.studies.measuring import report
from hipp_ext.evals.studies.recovery import pruning_plan
from hipp_ext.recover import TestbedData

COMPARED = ("fp32", "PowerSGD", "LQ-SGD 8 bits", "LQ-SGD 4 bits")
RANK, RATE, SHARE, QUESTIONS = 4, 1e-3, 0.2, 800
PICTURES = 3  # of a step's five batches, the first three are about pictures


def run(seeds: int = 5, steps: int = 60, save: bool = False) -> dict[str, Any]:
    """Measure; returns and prints the result. Accuracy: mean of POPE and ScienceQA in percent; loss: of the last five steps."""
    torch.set_num_threads(1)
    model, processor = testbed.load()
    asked = [testbed.questions(task, "test", QUESTIONS) for task in ("POPE", "ScienceQA")]
    evaluator = Evaluator(model, processor, *asked)
    start = prune(model, pruning_plan(model, processor))
    shapes = {n: p.shape for n, p in start.named_parameters()}
    table = {}
    for split in ("iid", "non-iid"):
        runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in COMPARED}
        for seed, name in itertools.product(range(seeds), COMPARED):
            average = methods(shapes, 2, RANK)[name](seed)
            data = TestbedData(processor, seed, SHARE)
            runs[name].append(_train(copy.deepcopy(start), average, data, split, steps, evaluator))
            print(split, seed, name, runs[name][-1], flush=True)
        table[f"2 workers, {split}"] = summary(runs)
        print_rows(f"2 workers, {split}", table[f"2 workers, {split}"])
    values = {
        "task": "testbed",
        "rank": RANK,
        "seeds": seeds,
        "steps": steps,
        "questions": QUESTIONS,
        "table": table,
    }
    return report(
        "comm_testbed", f"hipp bench comm --testbed --seeds {seeds} --steps {steps}", values, save
    )


def _train(
    model: Any, average: Averager, data: TestbedData, split: str, steps: int, evaluator: Evaluator
) -> tuple[float, float, float]:
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98))
    streams = [data.batches(rank, 2, 0) for rank in range(2)]
    losses, sent = [], 0.0
    for step in range(steps):
        gradients = []
        for batches in _of_step(streams, split):
            loss = torch.stack([model(**b).loss for b in batches]).sum()
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            pairs = zip(named.items(), found, strict=True)
            gradients.append({n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs})
            losses.append(loss.item())
        means, sent = average(gradients)
        for name, p in named.items():
            p.grad = means[name]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        optimizer.step()
    scores = evaluator(model.eval())
    return (scores["pope_accuracy"] + scores["choice_accuracy"]) / 2, sum(losses[-10:]) / 10, sent


def _of_step(streams: list[Iterator[list[Batch]]], split: str) -> list[list[Batch]]:
    taken = [next(s) for s in streams]
    return taken if split == "iid" else [taken[0][:PICTURES], taken[1][PICTURES:]]
