"""`hipp bench attacked`: does a planner fitted for POPE under attack keep more of it under attack, at equal sparsity?"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hipp_ext.evals.bench.measuring import mean_and_se, report
from hipp_ext.evals.evaluator import Evaluator

from hipp_ext import HiPPPlanner, Preference, prune, testbed
from hipp_ext.files import write_atomic
from hipp_ext.planner import FitSettings
from hipp_ext.robust.attacks import ImageAttack

OBJECTIVES = ("pope", "adversarial", "adaptive")
WISH = Preference(utility=0.1, robustness=0.8, compression=0.1)


def run(
    out: Path, seeds: int, steps: int, questions: int, tested: int, epsilon: float, ratio: float, save: bool,
    say: Callable[[str], None] = print, objectives: Sequence[str] = OBJECTIVES,
) -> dict[str, Any]:  # fmt: skip
    """Fit, plan and measure what is missing in `out`, then report.

    "adversarial" fits on pictures attacked once on the dense model, "adaptive" on pictures attacked anew for every plan; the
    measurement attacks every pruned model anew, on the test split.
    """
    torch.set_num_threads(1)
    rows = []
    for seed in range(seeds):
        for objective in objectives:
            path = out / f"{objective}-{seed}.json"
            if not path.exists():
                values = _measure(objective, seed, out, steps, questions, tested, epsilon, ratio)
                write_atomic(path, json.dumps(values) + "\n")
            rows.append(json.loads(path.read_text()))
            say(f"{objective} seed {seed}: {rows[-1]}")
    by = {o: [r for r in rows if r["objective"] == o] for o in objectives}
    keys = ("choice", "pope", "attacked")
    differences = {
        o: {k: mean_and_se([b[k] - a[k] for a, b in zip(by["pope"], by[o], strict=True)]) for k in keys} for o in objectives[1:]
    }
    return report("attacked", "hipp bench attacked", {
        "setting": {"steps": steps, "questions": questions, "tested": tested, "epsilon": epsilon, "pruning_ratio": ratio},
        "runs": rows, "means": {o: {k: mean_and_se([r[k] for r in rs]) for k in keys} for o, rs in by.items()},
        "minus_pope": differences,
    }, save)  # fmt: skip


def _measure(
    objective: str, seed: int, out: Path, steps: int, questions: int, tested: int, epsilon: float, ratio: float
) -> dict[str, Any]:
    model, processor = testbed.load()
    attack = ImageAttack(processor, epsilon=epsilon, steps=10, seed=seed)
    search = [testbed.questions(task, "search", questions) for task in ("POPE", "ScienceQA")]
    adaptive = objective == "adaptive"
    quick = ImageAttack(processor, epsilon=epsilon, steps=4, seed=seed) if adaptive else attack
    kind = "adversarial" if adaptive else objective
    evaluator = Evaluator(model, processor, *search, robustness=kind, attack=quick, adaptive=adaptive)
    planner = HiPPPlanner(WISH, pruning_ratio=ratio)
    planner.fit(
        model, evaluator, FitSettings(steps=steps, seed=seed), folder=out / f"fit-{objective}-{seed}", processor=processor
    )
    plan = planner.plan(model, processor=processor)
    small = prune(model, plan)
    test = [testbed.questions(task, "test", tested) for task in ("POPE", "ScienceQA")]
    scores = Evaluator(small, processor, *test, robustness="both", attack=attack).scores(small)
    names = {"choice": "choice", "pope": "pope", "attacked": "pope_attacked"}
    return {
        "objective": objective, "seed": seed, "pruning_ratio": plan.pruning_ratio,
        **{k: scores[n].accuracy for k, n in names.items()}, **{f"{k}_se": scores[n].accuracy_se for k, n in names.items()},
    }  # fmt: skip
