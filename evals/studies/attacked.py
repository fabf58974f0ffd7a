"""`hipp bench attacked`: does a planner fitted for POPE under attack keep more of it under attack, at equal sparsity?"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hipp_ext import HiPPPlanner, Preference, prune, testbed
from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.evals.studies.measuring import claim_folder, mean_and_se, report
from hipp_ext.files import write_atomic
from hipp_ext.image_attacks import ImageAttack
from hipp_ext.planner import FitSettings

OBJECTIVES = ("pope", "adversarial", "adaptive")
KEYS = {
    "choice": "choice",
    "pope": "pope",
    "attacked": "pope_attacked",
}  # in the result -> of the evaluator
WISH = Preference(utility=0.1, robustness=0.8, compression=0.1)


def run(
    out: Path,
    seeds: int,
    steps: int,
    questions: int,
    tested: int,
    epsilon: float,
    ratios: Sequence[float],
    save: bool,
    say: Callable[[str], None] = print,
    objectives: Sequence[str] = OBJECTIVES,
) -> dict[str, Any]:
    """Fit, plan and measure what is missing in `out`, then report.

    "adversarial" fits on pictures attacked once on the dense model, "adaptive" on pictures attacked anew for every plan; the
    measurement attacks every pruned model anew, on the test split.
    """
    torch.set_num_threads(1)
    setting = {"steps": steps, "questions": questions, "tested": tested, "epsilon": epsilon}
    claim_folder(out, setting)
    runs: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for ratio, seed, objective in itertools.product(ratios, range(seeds), objectives):
        path = out / f"{objective}-{ratio:g}-{seed}.json"
        if not path.exists():
            write_atomic(
                path,
                json.dumps(_measure(objective, ratio, seed, path.with_suffix(""), **setting))
                + "\n",
            )
        runs.setdefault((ratio, objective), []).append(json.loads(path.read_text()))
        found = ", ".join(f"{k} {runs[ratio, objective][-1][k]:.1f}" for k in KEYS)
        say(f"{objective} at {ratio:g}, seed {seed}: {found}")
    values = {"setting": setting} | {
        f"at {ratio:g}": _summary(ratio, objectives, runs) for ratio in ratios
    }
    return report("attacked", "hipp bench attacked", values, save)


def _summary(
    ratio: float, objectives: Sequence[str], runs: Mapping[tuple[float, str], list[dict[str, Any]]]
) -> dict[str, Any]:
    """Means of each objective, and paired differences to the fit on plain POPE."""
    by = {o: runs[ratio, o] for o in objectives}
    return {
        "runs": [r for o in objectives for r in by[o]],
        "means": {
            o: {k: mean_and_se([r[k] for r in rows]) for k in KEYS} for o, rows in by.items()
        },
        "minus_pope": {
            o: {
                k: mean_and_se([b[k] - a[k] for a, b in zip(by["pope"], by[o], strict=True)])
                for k in KEYS
            }
            for o in objectives
            if o != "pope"
        },
    }


def _measure(
    objective: str,
    ratio: float,
    seed: int,
    folder: Path,
    *,
    steps: int,
    questions: int,
    tested: int,
    epsilon: float,
) -> dict[str, Any]:
    model, processor = testbed.load()
    attack = ImageAttack(processor, epsilon=epsilon, steps=10, seed=seed)
    search = [testbed.questions(task, "search", questions) for task in ("POPE", "ScienceQA")]
    adaptive = objective == "adaptive"
    quick = ImageAttack(processor, epsilon=epsilon, steps=4, seed=seed) if adaptive else attack
    kind = "adversarial" if adaptive else objective
    evaluator = Evaluator(
        model, processor, *search, robustness=kind, attack=quick, adaptive=adaptive
    )
    planner = HiPPPlanner(WISH, pruning_ratio=ratio, cache=folder.parent / "signals")
    planner.fit(
        model, evaluator, FitSettings(steps=steps, seed=seed), folder=folder, processor=processor
    )
    plan = planner.plan(model, processor=processor)
    small = prune(model, plan)
    test = [testbed.questions(task, "test", tested) for task in ("POPE", "ScienceQA")]
    scores = Evaluator(small, processor, *test, robustness="both", attack=attack).scores(small)
    return {
        "objective": objective,
        "seed": seed,
        "removed": plan.pruning_ratio,
        **{k: scores[n].accuracy for k, n in KEYS.items()},
        **{f"{k}_se": scores[n].accuracy_se for k, n in KEYS.items()},
    }
