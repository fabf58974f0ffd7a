"""`hipp front`: the non-dominated plans of a fitted planner, and two answers to one preference."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from hipp_ext.errors import DataError
from hipp_ext.evals.figures import front_figure, png
from hipp_ext.files import write_atomic
from hipp_ext.planner.experience import Experience
from hipp_ext.planner.planner import Choices, FrontPlan, HiPPPlanner
from hipp_ext.planner.reward import Evaluator, Reward, scores_agree
from hipp_ext.preference import Preference


def answer(
    planner: HiPPPlanner,
    preference: Preference,
    model: nn.Module | None = None,
    evaluator: Evaluator | None = None,
) -> Choices:
    """The policy's and the best archived plan; with a model and the evaluator of the fit, the policy's is measured if it
    never was.

    Raises:
        DataError: the evaluator is not that of the fit: it asks other questions or, where that cannot be known, says something
            else of the dense model.
    """
    choices = planner.choices(preference)
    if choices.policy.reward is None and model is not None and evaluator is not None:
        _check_same(planner.experience, evaluator, model)
        reward = planner.rewards(model, [choices.policy.plan], evaluator)[0]
        choices = dataclasses.replace(
            choices, policy=FrontPlan(plan=choices.policy.plan, reward=reward)
        )
    return choices


def _check_same(experience: Experience, evaluator: Evaluator, model: nn.Module) -> None:
    fit, ours = experience.dense, getattr(evaluator, "digest", None)
    if fit is None:
        return
    now = evaluator(model)
    known = experience.evaluator is not None and ours is not None
    if (known and ours != experience.evaluator) or not scores_agree(
        fit, {name: now[name] for name in fit}
    ):
        told = [", ".join(f"{name} {said[name]:.3f}" for name in fit) for said in (fit, now)]
        raise DataError(
            f"This is not what the plans of the fit were measured on: there the dense model has {told[0]}, here {told[1]}. "
            "Give the questions, their number and the kind of robustness of the fit."
        )


def print_front(planner: HiPPPlanner, choices: Choices | None) -> None:
    """The front as a table, least pruned first, and the two answers below it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    front = planner.front()
    table = Table(
        title=f"{len(front)} non-dominated of {len(planner.archive.measured)} evaluated plans",
        box=SIMPLE_HEAD,
    )
    for column in ("", "compression [%]", "utility", "robustness"):
        table.add_column(column, justify="right" if column else "left")
    rows: list[tuple[str, Reward | None]] = [(str(i), f.reward) for i, f in enumerate(front)]
    if choices:
        rows += [("policy", choices.policy.reward), ("best archived", choices.archived.reward)]
    for i, (name, reward) in enumerate(rows):
        table.add_row(name, *_cells(reward), end_section=i == len(front) - 1)
    console = Console(markup=False)
    console.print(table)
    if choices:
        console.print(choices.verdict())


def _cells(reward: Reward | None) -> list[str]:
    if reward is None:
        return ["not evaluated", "", ""]
    cells = [f"{100 * reward.compression:.1f}"]
    for value, error in (
        (reward.utility, reward.utility_se),
        (reward.robustness, reward.robustness_se),
    ):
        cells.append(f"{value:.3f}" + (f" \u00b1 {error:.3f}" if error else ""))
    return cells


def write_picture(planner: HiPPPlanner, choices: Choices | None, path: Path) -> None:
    """The front as a PNG."""
    chosen = (
        {"policy": choices.policy.reward, "best archived": choices.archived.reward}
        if choices
        else {}
    )
    evaluated = [r.reward for r in planner.archive.measured]
    front = [f.reward for f in planner.front() if f.reward]
    write_atomic(path, png(front_figure(evaluated, front, {n: r for n, r in chosen.items() if r})))


def front_rows(planner: HiPPPlanner) -> list[dict[str, Any]]:
    """The front for a JSON file: {reward, keeps} of every plan, least pruned first."""
    return [
        {"reward": f.reward.as_dict() if f.reward else None, "keeps": f.plan.keep_counts}
        for f in planner.front()
    ]
