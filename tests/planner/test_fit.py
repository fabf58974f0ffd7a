"""A fit learns what pays, survives interruption, and leaves no trace."""

import contextlib
import multiprocessing
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from devices import later_half, pretended_devices, spread
from fitting import BATCHES, SETTINGS, Closeness, fitted, planner_with
from models import build

from hipp_ext import HiPPPlanner, Preference, prune
from hipp_ext.budget import Bounds
from hipp_ext.errors import BudgetError, CheckpointError, DataError
from hipp_ext.planner.archive import Archive
from hipp_ext.planner.cost import compression, cost_of
from hipp_ext.planner.evaluation import plan_rewards
from hipp_ext.planner.fit import Trainer
from hipp_ext.planner.policy import new_policy
from hipp_ext.planner.problem import FitProblem
from hipp_ext.planner.settings import FitSettings
from hipp_ext.planner.state import measure_signals
from hipp_ext.sensitivity.curves import LEVELS


@pytest.fixture(scope="module")
def whole(model, signals, tmp_path_factory):
    """An undisturbed fit and its folder, which no test changes."""
    folder = tmp_path_factory.mktemp("fit") / "whole"
    return fitted(model, signals, folder), folder


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of the folder of the undisturbed fit."""
    return shutil.copytree(whole[1], tmp_path / "finished")


def test_fit_learns_what_pays():
    """The one group that matters to this evaluator must be kept more than before."""
    model = build("llava")
    signals = measure_signals(model, BATCHES)
    planner = planner_with(signals, Preference(1, 1, 0), pruning_ratio=0.4)
    before = planner.plan(model).keep_counts["language.1.ffn"]
    x = torch.randn(2, 5, 40)
    mlp = model.model.language_model.layers[1].mlp
    dense = mlp(x)

    def evaluator(m):
        closeness = float(1 - (mlp(x) - dense).norm() / dense.norm())
        return {"utility": closeness, "robustness": closeness}

    with torch.no_grad():
        planner.fit(
            model,
            evaluator,
            FitSettings(steps=15, preferences=3, rollouts=4, updates=10),
            progress=False,
        )
    after = planner.plan(model).keep_counts["language.1.ffn"]
    assert after > before + 4


def test_compression_counts_what_was_asked(model, signals):
    planner = planner_with(signals)
    planner.fit(model, Closeness(model), SETTINGS, cost="flops", progress=False)
    cost = cost_of(signals.groups, "flops")
    for record in planner.archive.records:
        expected = float(compression(cost, signals.groups, [record.keep_counts])[0])
        assert record.reward.compression == pytest.approx(expected)


def test_the_same_seed_gives_the_same_archive(model, signals):
    archives = []
    for seed in (3, 3, 4):
        planner = planner_with(signals)
        planner.fit(
            model,
            Closeness(model),
            FitSettings(steps=2, rollouts=2, updates=5, seed=seed),
            progress=False,
        )
        archives.append([r.model_dump() for r in planner.archive.records])
    assert archives[0] == archives[1] != archives[2]


def test_a_fit_leaves_no_trace_in_the_model_or_the_random_state(model, signals):
    state = torch.get_rng_state()
    fitted(model, signals)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_pre_hooks for m in model.modules())


class Interrupting(Closeness):
    """Stops like ctrl-C at the given call."""

    def __init__(self, model, at):
        super().__init__(model)
        self.at = at

    def __call__(self, model):
        if self.calls == self.at:
            raise KeyboardInterrupt
        return super().__call__(model)


@pytest.mark.parametrize("at", [0, 5, 8, 13, 19])
def test_ctrl_c_and_resume_end_like_an_undisturbed_fit(model, signals, whole, tmp_path, at):
    planner, (undisturbed, folder) = planner_with(signals), whole
    with pytest.raises(KeyboardInterrupt):
        planner.fit(
            model, Interrupting(model, at), SETTINGS, folder=tmp_path / "cut", progress=False
        )
    evaluator = Closeness(model)
    planner.fit(model, evaluator, SETTINGS, folder=tmp_path / "cut", progress=False)
    assert (tmp_path / "cut/archive.jsonl").read_text() == (folder / "archive.jsonl").read_text()
    assert all(
        torch.equal(a, b)
        for a, b in zip(planner.policy.parameters(), undisturbed.policy.parameters(), strict=True)
    )
    # One call measures the dense model; what the interrupted run had evaluated is not evaluated
    # again.
    assert evaluator.calls <= 1 + SETTINGS.evaluations - max(0, at - 1)


def test_a_finished_fit_is_not_repeated_and_can_be_prolonged(model, signals, finished):
    evaluator, again = Closeness(model), planner_with(signals)
    again.fit(model, evaluator, SETTINGS, folder=finished, progress=False)
    # One call measures the dense model, to see that the evaluator is the same.
    assert evaluator.calls == 1 and len(again.archive) == SETTINGS.evaluations
    longer = FitSettings(**{**SETTINGS.__dict__, "steps": 4})
    copied = shutil.copytree(finished, finished.with_name("copy"))
    assert again.fit(model, evaluator, longer, folder=finished, progress=False).steps == 4
    # By a planner that has learned already, or by a new one with another seed: what the fit began
    # with lies in its folder.
    new = planner_with(signals, seed=1)
    new.fit(model, evaluator, longer, folder=copied, progress=False)
    assert [r.keep_counts for r in new.archive.records] == [
        r.keep_counts for r in again.archive.records
    ]
    assert all(
        torch.equal(a, b)
        for a, b in zip(new.policy.parameters(), again.policy.parameters(), strict=True)
    )


def test_kill_9_during_a_fit_and_resume(model, signals, tmp_path):
    """Forked processes, so that none of them imports anything; what one learned reaches the next by
    the folder alone.
    """
    fork = multiprocessing.get_context("fork")
    settings = FitSettings(**{**SETTINGS.__dict__, "steps": 6})

    def fit(folder):
        planner_with(signals).fit(model, Closeness(model), settings, folder=folder, progress=False)

    def start(folder):
        process = fork.Process(target=fit, args=(folder,))
        process.start()
        return process

    def end(process):
        process.join(120)
        return process.exitcode

    def plans(folder):
        archive = folder / "archive.jsonl"
        return archive.read_text().count("\n") if archive.exists() else 0

    assert end(start(tmp_path / "whole")) == 0
    for least in (1, 18):  # in the first step, and after several
        process, limit = start(tmp_path / "cut"), time.monotonic() + 60
        while plans(tmp_path / "cut") < least and time.monotonic() < limit:
            time.sleep(0.001)
        process.kill()
        assert end(process) == -signal.SIGKILL
        assert least <= plans(tmp_path / "cut") < settings.evaluations
    assert end(start(tmp_path / "cut")) == 0
    assert (tmp_path / "cut/archive.jsonl").read_text() == (
        tmp_path / "whole/archive.jsonl"
    ).read_text()


def test_a_fit_that_is_ended_early_learns_from_all_its_plans(model, signals, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        planner_with(signals).fit(
            model, Interrupting(model, 17), SETTINGS, folder=tmp_path, progress=False
        )
    shutil.copytree(tmp_path, cut := tmp_path.with_name(tmp_path.name + "-cut"))
    policies = []
    for final in (
        0.0,
        SETTINGS.final_update_fraction,
        SETTINGS.final_update_fraction,
    ):  # the last one finds that nothing is left to do
        folder = cut if final == 0 else tmp_path
        settings = FitSettings(**{**SETTINGS.__dict__, "steps": 1, "final_update_fraction": final})
        if final == 0:
            text = (folder / "run.json").read_text()
            (folder / "run.json").write_text(
                text.replace(
                    f'"final_update_fraction": {SETTINGS.final_update_fraction}',
                    '"final_update_fraction": 0.0',
                )
            )
        planner, evaluator = planner_with(signals), Closeness(model)
        result = planner.fit(model, evaluator, settings, folder=folder, progress=False)
        assert result.steps == 2 and result.evaluations == 16 and evaluator.calls == 1
        policies.append(torch.cat([p.flatten() for p in planner.policy.parameters()]))
    assert not torch.equal(policies[0], policies[1]) and torch.equal(policies[1], policies[2])


@pytest.mark.parametrize("ratio", [0.35, 0.6])
def test_a_fit_at_a_fixed_ratio_has_archived_answers(model, signals, ratio, tmp_path):
    planner = planner_with(
        signals, pruning_ratio=ratio
    )  # single precision is below 0.35, and above 0.6
    planner.fit(model, Closeness(model), SETTINGS, progress=False)
    assert {r.pruning_ratio for r in planner.archive.records} == {ratio}
    assert planner.plan(model, best_evaluated=True).pruning_ratio >= ratio


def test_a_fit_that_cannot_start_leaves_its_folder_alone(model, signals, tmp_path):
    with pytest.raises(BudgetError, match="cannot be met"):
        planner_with(signals, pruning_ratio=0.95).fit(
            model, Closeness(model), SETTINGS, folder=tmp_path / "fit", progress=False
        )
    assert not (tmp_path / "fit").exists()


def test_a_fit_in_inference_mode(model):
    with torch.inference_mode():
        planner = HiPPPlanner(Preference(1, 1, 1), cache=None)
        planner.plan(model, calibration=BATCHES)
        planner.fit(model, Closeness(model), SETTINGS, progress=False)
        inside = planner.plan(model)
    other = HiPPPlanner(Preference(1, 1, 1), cache=None)
    other.fit(model, Closeness(model), SETTINGS, calibration=BATCHES, progress=False)
    assert inside == other.plan(model)


def test_budgets_keep_within_tight_bounds(model, signals):
    planner = planner_with(signals, bounds=Bounds(min_keep=0.7))
    planner.fit(model, Closeness(model), FitSettings(steps=4, updates=5), progress=False)
    ratios = [r.pruning_ratio for r in planner.archive.records]
    assert max(ratios) < 0.3 and sum(r > 0.29 for r in ratios) < len(ratios) / 3


@pytest.mark.parametrize("drop", ["blocks", "layers"])
def test_a_fit_may_drop_blocks(model, tmp_path, drop):
    planner = HiPPPlanner(Preference(0, 0, 1), bounds=Bounds(drop=drop, min_keep=0.6), cache=None)
    planner.fit(model, Closeness(model), SETTINGS, calibration=BATCHES, progress=False)
    counts = [r.keep_counts for r in planner.archive.records]
    assert (
        planner.signals.sensitivity.shape[2] == len(LEVELS)
        and planner.bounds.allow(planner.signals.groups, np.array(counts)).all()
    )
    assert any(0 in plan for plan in counts)  # with floors of 0.6, large ratios need it
    planner.save(tmp_path / "p")
    loaded = HiPPPlanner.load(tmp_path / "p")
    assert loaded.bounds == planner.bounds and loaded.plan(model) == planner.plan(model)
    assert [f.plan for f in loaded.front()] == [f.plan for f in planner.front()]


def test_a_fit_whose_archive_lost_lines_is_not_resumed(model, signals, finished):
    path = finished / "archive.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(CheckpointError, match="holds 23 of the 24 plans before step 3"):
        fitted(model, signals, finished)
    path.unlink()
    with pytest.raises(CheckpointError, match="holds 0 of the 24 plans"):
        fitted(model, signals, finished)


def test_half_a_line_at_the_end_of_the_archive_is_dropped(model, signals, finished):
    path = finished / "archive.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert len(Archive(path)) == SETTINGS.evaluations
    fitted(model, signals, finished)
    assert path.read_text() == whole
    path.write_text(whole[:40] + "\n" + whole)
    with pytest.raises(CheckpointError, match="line 1, is not a record"):
        Archive(path)


def test_a_folder_of_another_fit_is_refused(model, signals, finished):
    with pytest.raises(CheckpointError, match=r"holds another run: settings\.\w+ is"):
        planner_with(signals).fit(
            model, Closeness(model), FitSettings(steps=3, seed=9), folder=finished, progress=False
        )

    class Other(Closeness):
        def __call__(self, model):
            return {name: value / 2 for name, value in super().__call__(model).items()}

    with pytest.raises(CheckpointError, match="holds another run: dense"):
        planner_with(signals).fit(model, Other(model), SETTINGS, folder=finished, progress=False)

    class Elsewhere(Closeness):  # the same on other hardware
        def __call__(self, model):
            return {name: value - 0.002 for name, value in super().__call__(model).items()}

    planner_with(signals).fit(model, Elsewhere(model), SETTINGS, folder=finished, progress=False)
    asks = Closeness(model)
    asks.digest = "other questions, the same scores"
    with pytest.raises(CheckpointError, match="holds another run: evaluator"):
        planner_with(signals).fit(model, asks, SETTINGS, folder=finished, progress=False)
    narrow = planner_with(signals)
    narrow.policy = new_policy(width=32)
    with pytest.raises(CheckpointError, match="of another policy"):
        narrow.fit(model, Closeness(model), SETTINGS, folder=finished, progress=False)
    (finished / "run.json").write_bytes(b"\xff\xfe[]")
    with pytest.raises(CheckpointError, match="is damaged"):
        fitted(model, signals, finished)
    (finished / "run.json").unlink()
    (finished / "checkpoint.safetensors").write_bytes(b"\x00" * 9)
    with pytest.raises(CheckpointError, match="is damaged"):
        fitted(model, signals, finished)


@pytest.mark.parametrize(
    "answer", [{}, {"utility": 1.0}, {"utility": float("nan"), "robustness": 0.0}, 3.0, None]
)
def test_an_evaluator_that_returns_something_else_is_refused(model, signals, answer):
    with pytest.raises(DataError, match="must return a finite number as '(utility|robustness)'"):
        planner_with(signals).fit(model, lambda m: answer, SETTINGS, progress=False)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": -1},
        {"rollouts": 1},
        {"preferences": 0},
        {"budgets": 0},
        {"noise": (0.0, 0.0)},
        {"noise": (0.7, float("nan"))},
        {"budget_noise": 0.0},
        {"lr": -1.0},
        {"candidates": 7},
        {"updates": -1},
        {"seed": 1.5},
        {"steps": "2"},
        {"rollouts": True},
        {"final_update_fraction": None},
    ],
)
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match=r"(are|is) needed"):
        FitSettings(**bad)


def test_a_policy_with_extreme_logits_is_brought_back(model, signals):
    planner = planner_with(signals)
    evaluator = Closeness(model)
    with plan_rewards(model, evaluator, signals, cost_of(signals.groups, "parameters")) as measure:
        settings = FitSettings(
            steps=1,
            preferences=2,
            budgets=2,
            rollouts=2,
            updates=5,
            final_update_fraction=2.0,
            seed=3,
        )
        cost = cost_of(signals.groups, "parameters")
        problem = FitProblem(signals=signals, settings=settings, cost=cost)
        trainer = Trainer(planner.policy, problem, lambda plans: [measure(k) for k in plans])
        with torch.no_grad():
            planner.policy.allocation_head.weight.normal_(std=1e3)
            planner.policy.budget_head.bias.fill_(-50)
        trainer.run(progress=False)
    ratio, allocation = planner.policy.decide(signals, Preference(1, 1, 8))
    assert ratio > 0.1 and max(map(abs, allocation)) < 10


UNLABELLED = [{k: v for k, v in b.items() if k != "labels"} for b in BATCHES]


@pytest.mark.parametrize("way", ["device_map", "bfloat16"])
def test_fit_of_a_model_on_several_devices_or_in_half_precision(way):
    """Plans of the first step do not depend on what they earn, so on two devices they are those of
    the whole model.
    """
    settings = FitSettings(steps=1, preferences=2, budgets=2, rollouts=2, updates=3, seed=3)
    whole = planner_with(measure_signals(build("llava"), UNLABELLED))
    whole.fit(build("llava"), Closeness(build("llava"), UNLABELLED), settings, progress=False)
    with pretended_devices() if way == "device_map" else contextlib.nullcontext():
        model = build("llava")
        model = model.bfloat16() if way == "bfloat16" else spread(model, later_half(model))
        before = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
        planner = HiPPPlanner(Preference(1, 1, 1), cache=None)
        planner.fit(
            model, Closeness(model, UNLABELLED), settings, calibration=UNLABELLED, progress=False
        )
        assert all(
            torch.equal(p.detach().cpu(), before[name]) for name, p in model.named_parameters()
        )
        plan = planner.plan(model, preference=Preference(1, 1, 0))
        small = prune(model, plan)
        assert sum(p.numel() for p in small.parameters()) < sum(
            p.numel() for p in model.parameters()
        )
        assert {p.dtype for p in small.parameters()} == {
            torch.bfloat16 if way == "bfloat16" else torch.float32
        }
    if way == "device_map":
        those, these = whole.archive.records, planner.archive.records
        assert [r.keep_counts for r in these] == [r.keep_counts for r in those]
        assert np.allclose(
            [r.reward.objectives() for r in these],
            [r.reward.objectives() for r in those],
            atol=1e-5,
        )
    assert len(planner.archive) == settings.evaluations and all(
        0 < f.reward.utility <= 1.01 for f in planner.front()
    )
