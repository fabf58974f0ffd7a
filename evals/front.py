"""`hipp front`: the Pareto front of a fitted planner, and two answers to one preference."""

import dataclasses
from typing import Any

from torch import nn

from hipp_ext.errors import DataError
from hipp_ext.evals.text_table import add_rows, print_table, text_table
from hipp_ext.planner import Answers, HiPPPlanner, ParetoPlan
from hipp_ext.planner.history import FitHistory
from hipp_ext.planner.reward import Evaluator, Reward, scores_agree
from hipp_ext.preference import Preference


def answer(
    planner: HiPPPlanner,
    preference: Preference,
    model: nn.Module | None = None,
    evaluator: Evaluator | None = None,
) -> Answers:
    """The policy's plan and the best evaluated plan for a preference.

    Args:
        planner: fitted planner.
        preference: weights of the objectives.
        model: the fitted model. With it and the evaluator, the policy's plan is evaluated if it
            never was.
        evaluator: evaluator of the fit.

    Raises:
        DataError: the evaluator is not that of the fit: it has other questions or, where that is
            unknown, gives the dense model other scores.
    """
    answers = planner.answers(preference)
    if answers.policy.reward is None and model is not None and evaluator is not None:
        _check_same(planner.history, evaluator, model)
        reward = planner.rewards(model, [answers.policy.plan], evaluator)[0]
        measured = ParetoPlan(plan=answers.policy.plan, reward=reward)
        answers = dataclasses.replace(answers, policy=measured)
    return answers


def _check_same(history: FitHistory, evaluator: Evaluator, model: nn.Module) -> None:
    fit, ours = history.dense, getattr(evaluator, "digest", None)
    if fit is None:
        return
    now = evaluator(model)
    known = history.evaluator is not None and ours is not None
    if (known and ours != history.evaluator) or not scores_agree(
        fit, {name: now[name] for name in fit}
    ):
        there, here = (", ".join(f"{n} {scores[n]:.3f}" for n in fit) for scores in (fit, now))
        raise DataError(
            "This is not what the plans of the fit were measured on: there the dense model has "
            f"{there}, here {here}. Give the questions, their number and the kind of robustness "
            "of the fit."
        )


def print_front(planner: HiPPPlanner, answers: Answers | None) -> None:
    """Print the front as a table, least pruned first, and the two answers below it."""
    front = planner.front()
    table = text_table(
        ("", "compression [%]", "utility", "robustness"),
        [[str(i), *_cells(f.reward)] for i, f in enumerate(front)],
        title=f"{len(front)} non-dominated of {len(planner.archive.measured)} evaluated plans",
    )
    if answers:
        rewards = {"policy": answers.policy.reward, "best evaluated": answers.best_evaluated.reward}
        add_rows(table, [[name, *_cells(reward)] for name, reward in rewards.items()])
    print_table(table)
    if answers:
        print(answers.verdict())


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


def front_rows(planner: HiPPPlanner) -> list[dict[str, Any]]:
    """The front for a JSON file: {reward, keep_counts} of every plan, least pruned first."""
    return [
        {"reward": f.reward.as_dict() if f.reward else None, "keep_counts": f.plan.keep_counts}
        for f in planner.front()
    ]
