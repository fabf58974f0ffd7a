"""What a fitted planner answers: the front, the best evaluated plan, and which dominates."""

import copy
import json

import numpy as np
import pytest
import torch
from fitting import BATCHES, EVEN, SETTINGS, Closeness, fitted, planner_with
from models import batch
from plans import random_plan

from hipp_ext import HiPPPlanner, Preference, masked
from hipp_ext.budget import Bounds
from hipp_ext.errors import PlanError
from hipp_ext.evals.drawing import draw_front, draw_plans
from hipp_ext.evals.front import answer, front_rows, print_front
from hipp_ext.planner import Answers, ParetoPlan
from hipp_ext.planner.archive import Archive, Record
from hipp_ext.planner.history import FitHistory
from hipp_ext.planner.reward import Reward, scalarise


def test_front_holds_no_dominated_plan(model, signals):
    planner = planner_with(signals)
    with pytest.raises(PlanError, match="call fit"):
        planner.front()
    result = planner.fit(model, Closeness(model), SETTINGS, progress=False)
    assert (
        result.evaluations == SETTINGS.evaluations == len(planner.archive)
        and result.hypervolume > 0
    )
    front = [f.reward.objectives() for f in planner.front()]
    everything = [r.reward.objectives() for r in planner.archive.records]
    for point in front:
        assert not any(
            all(a >= b for a, b in zip(o, point, strict=True)) and o != point for o in everything
        )
    for other in everything:
        assert any(all(a >= b for a, b in zip(point, other, strict=True)) for point in front)
    ratios = [f.plan.pruning_ratio for f in planner.front()]
    assert [f.reward.compression for f in planner.front()] == pytest.approx(ratios)


def test_two_answers_to_a_preference(model, signals, tmp_path, capsys):
    planner, evaluator = planner_with(signals, Preference(0.2, 0.6, 0.2)), Closeness(model)
    for ask in (planner.answers, lambda: planner.plan(model, best_evaluated=True)):
        with pytest.raises(PlanError, match="no evaluated plan"):
            ask()
    with pytest.raises(PlanError, match="no signals of this model"):
        HiPPPlanner(EVEN).rewards(model, [], evaluator)
    planner.fit(model, evaluator, SETTINGS, progress=False)
    wanted = Preference(0.3, 0.3, 0.4)
    answers = answer(planner, wanted, model, evaluator)
    assert answers.policy.plan == planner.plan(model, preference=wanted)
    with masked(model, answers.policy.plan):
        expected = evaluator(model)
    assert answers.policy.reward.utility == pytest.approx(expected["utility"], abs=1e-5)
    best = answers.best_evaluated.reward
    assert f"utility {best.utility:.3f}" in str(best) and f"{best.compression:.1%}" in str(best)
    ends = planner.archive.nadir_and_ideal()
    values = [
        scalarise(torch.tensor(reward.objectives()), torch.tensor(wanted.as_tuple()), ends)
        for reward in (best, *(r.reward for r in planner.archive.records))
    ]
    assert values[0] == max(values)
    assert (
        planner.plan(model, preference=wanted, best_evaluated=True) == answers.best_evaluated.plan
    )
    assert answers.best_evaluated.plan.preference == wanted.as_tuple()
    planner.pruning_ratio = 0.5
    at_half = planner.answers(wanted)
    for plan in (at_half.policy.plan, at_half.best_evaluated.plan):
        assert plan.pruning_ratio >= 0.5 - 1e-6
    planner.pruning_ratio = 0.8
    with pytest.raises(PlanError, match="removes 0.8 or more"):
        planner.answers(wanted)
    print_front(planner, answers)
    drawn = draw_front(planner, answers)
    drawn.save(tmp_path / "front.png")
    out = capsys.readouterr().out
    assert answers.verdict().split()[0] in out and "best evaluated" in out
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"
    names = [text.get_text() for text in drawn.figure.legends[0].get_texts()]
    assert "best evaluated" in names and drawn._repr_png_()[:4] == b"\x89PNG"
    plain = draw_plans({"one": at_half.policy.plan}).figure
    below = draw_plans({"one": at_half.policy.plan}, planner.signals).figure
    assert len(below.axes) > len(plain.axes)  # the visual sensitivity
    rows = json.loads(json.dumps(front_rows(planner)))
    assert [r["reward"]["compression"] for r in rows] == [
        f.reward.compression for f in planner.front()
    ]
    assert [r["keep_counts"] for r in rows] == [f.plan.keep_counts for f in planner.front()]


def test_an_archive_belongs_to_the_model_it_was_evaluated_on(model, signals, tmp_path):
    planner, other = planner_with(signals), copy.deepcopy(model)
    planner.fit(model, Closeness(model), SETTINGS, progress=False)
    known = planner.answers().best_evaluated.plan
    with torch.no_grad():
        next(other.model.language_model.layers[0].mlp.parameters()).mul_(1.1)
    for round_trip in range(
        2
    ):  # as it was fitted, then as it was when last asked about the other model
        planner.save(tmp_path / str(round_trip))
        planner = HiPPPlanner.load(tmp_path / str(round_trip))
        for ask in (
            lambda p=planner: p.plan(other, calibration=BATCHES, best_evaluated=True),
            planner.answers,
            planner.front,
        ):
            with pytest.raises(PlanError, match="evaluated on another model"):
                ask()
    # Asked about another model in between, it still knows its own.
    assert planner.plan(model, calibration=BATCHES, best_evaluated=True) == known


def test_an_archive_belongs_to_the_units_it_was_evaluated_with(model, signals):
    """Equal keep counts on other calibration keep other units, of which nothing is known."""
    planner = fitted(model, signals)
    planner.signals = None
    other = planner.measure(model, calibration=[batch("llava", size=4, seed=7, labels=True)])
    assert other.digest == signals.digest and other.ranking != signals.ranking
    for ask in (planner.answers, planner.front, lambda: planner.plan(model, best_evaluated=True)):
        with pytest.raises(PlanError, match="units ranked by other scores"):
            ask()


def test_rewards_are_for_plans_of_the_planner(model, signals):
    planner = planner_with(signals)
    with pytest.raises(PlanError, match="keeps other units"):
        planner.rewards(model, [random_plan(model)], Closeness(model))


def test_verdicts(model, signals):
    plans = [planner_with(signals, pruning_ratio=r).plan(model) for r in (0.2, 0.4)]
    rewards = [Reward(utility=u, robustness=0.5, compression=0.3) for u in (0.6, 0.5)]
    tied = Reward(utility=0.4, robustness=0.9, compression=0.3)

    def verdict(mine, theirs, same=False):
        return Answers(
            policy=ParetoPlan(plan=plans[0], reward=mine),
            best_evaluated=ParetoPlan(plan=plans[0 if same else 1], reward=theirs),
        ).verdict()

    assert verdict(rewards[0], rewards[1]) == "The policy's plan dominates the best evaluated one."
    assert verdict(rewards[1], rewards[0]).startswith("The best evaluated plan dominates")
    assert verdict(rewards[0], tied) == "Neither dominates the other."
    assert verdict(rewards[0], rewards[0], same=True) == "They are the same plan."
    assert "was not evaluated" in verdict(None, tied)


def test_what_answers_is_within_the_bounds(model, signals):
    planner = fitted(model, signals)
    planner.bounds = Bounds(min_keep=0.4)
    allowed = [
        r
        for r in planner.archive.records
        if planner.bounds.allow(signals.groups, np.array([r.keep_counts]))[0]
    ]
    assert 0 < len(allowed) < len(planner.archive)
    for wanted in (Preference(1, 0, 0), Preference(0, 1, 0), Preference(0, 0, 1), EVEN):
        for plan in (
            planner.plan(model, preference=wanted),
            planner.plan(model, preference=wanted, best_evaluated=True),
        ):
            assert all(g.keep >= 0.4 * g.width for g in plan.groups)
    planner.bounds = Bounds(min_keep=1.0)
    with pytest.raises(PlanError, match=r"allows none of \d+ evaluated plans"):
        planner.answers()
    assert planner.plan(model).pruning_ratio == 0


def test_a_plan_asked_for_twice_answers_the_larger_budget_too(model, signals):
    """What was asked for last, 0.29, does not take away what it did at 0.31."""
    planner = planner_with(signals, pruning_ratio=0.31, bounds=Bounds(round_to=4))
    keeps = tuple(g.keep for g in planner.plan(model).groups)
    reward = Reward(utility=0.9, robustness=0.9, compression=0.31)
    asked = [
        Record(
            step=0,
            index=i,
            preference=(1, 0, 0),
            pruning_ratio=ratio,
            allocation=(0.0,),
            keep_counts=keeps,
            reward=reward,
        )
        for i, ratio in enumerate((0.31, 0.29))
    ]
    history = FitHistory(archive=Archive(records=asked), ranking=signals.ranking)
    assert history.best(EVEN, signals.groups, Bounds(), 0.3).keep_counts == keeps
    rounded = planner.plan(model).pruning_ratio
    assert (
        rounded > 0.3103
        and history.best(EVEN, signals.groups, Bounds(), 0.3103).keep_counts == keeps
    )  # it removes more than asked
    with pytest.raises(PlanError, match=r"removes 0\.32 or more"):
        history.best(EVEN, signals.groups, Bounds(), 0.32)
