"""The planner on tiny models: what a preference does, what is refused, and that a fit survives interruption."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hipp_ext.evals.front import answer, front_rows, print_front, write_picture
from models import batch, build
from test_surgery import random_plan

from hipp_ext import HiPPPlanner, Preference, PruningPlan, masked
from hipp_ext.answers import AnswerLogits
from hipp_ext.budget import Bounds
from hipp_ext.errors import BudgetError, CalibrationError, CheckpointError, DataError, PlanError
from hipp_ext.groups import find_groups
from hipp_ext.planner.archive import Archive, Record
from hipp_ext.planner.cost import fit_cost, measure_cost
from hipp_ext.planner.evaluation import plan_rewards
from hipp_ext.planner.fit import FitSettings, Trainer
from hipp_ext.planner.grpo import Learner, allocation_advantages, draw_preferences
from hipp_ext.planner.planner import Choices, FrontPlan
from hipp_ext.planner.policy import MAX_RATIO, new_policy
from hipp_ext.planner.reward import WHOLE, Reward, scalarise
from hipp_ext.planner.state import keep_shares, measure_signals
from hipp_ext.scorers import MRS

BATCHES = [batch("llava", size=3, labels=True), batch("llava", size=2, seed=1, labels=True)]
EVEN = Preference(1, 1, 1)
SETTINGS = FitSettings(steps=3, preferences=2, budgets=2, rollouts=2, imagined=5, seed=3)


@pytest.fixture(scope="module")
def model():
    return build("llava")


@pytest.fixture(scope="module")
def signals(model):
    return measure_signals(model, BATCHES)


class Closeness:
    """A real evaluator of a random model: how close answers stay to the dense ones, on two halves of the batches."""

    def __init__(self, model):
        self.answers = AnswerLogits(model, BATCHES)
        self.dense = self.answers(model).log_softmax(-1)
        self.calls = 0

    def __call__(self, model):
        self.calls += 1
        kl = (self.dense.exp() * (self.dense - self.answers(model).log_softmax(-1))).sum(-1)
        return {"utility": 1 - float(kl[:2].mean()), "robustness": 1 - float(kl[2:].mean())}


def planner_with(signals, preference=EVEN, **options) -> HiPPPlanner:
    planner = HiPPPlanner(preference, **options)
    planner.signals = signals
    return planner


def test_a_plan_meets_the_ratio_and_leaves_the_model_alone(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = HiPPPlanner(Preference(0.4, 0.4, 0.2), pruning_ratio=0.3).plan(model, calibration=BATCHES)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not model.training
    largest = max(g.unit_parameters for g in plan.groups)
    total = sum(g.width * g.unit_parameters for g in plan.groups)
    assert 0.3 <= plan.pruning_ratio < 0.3 + largest / total
    assert plan.preference == pytest.approx((0.4, 0.4, 0.2)) and plan.scorer == "WandaSP"


@pytest.mark.parametrize("name", ["llava_gqa", "qwen2_5_vl", "smolvlm", "llama", "qwen3"])
def test_other_models(name):
    plan = HiPPPlanner(EVEN, pruning_ratio=0.4).plan(build(name), calibration=[batch(name)])
    assert plan.pruning_ratio >= 0.4 and len(plan.groups) == 6


def test_the_wish_for_compression_sets_the_budget(model, signals):
    ratios = [planner_with(signals, Preference(1 - c, 1 - c, 2 * c)).plan(model).pruning_ratio for c in (0, 0.25, 0.5, 0.75, 1)]
    assert ratios == sorted(ratios) and ratios[0] < 0.05 and ratios[-1] > MAX_RATIO - 0.05


def test_the_untrained_policy_follows_measured_sensitivity(model, signals):
    plan = planner_with(signals, Preference(1, 0, 1), pruning_ratio=0.4).plan(model)
    for kind in ("attention", "ffn"):
        rows = [(float(signals.prior[i]), g.keep) for i, g in enumerate(plan.groups) if g.kind == kind]
        keeps = [keep for _, keep in sorted(rows)]
        assert keeps == sorted(keeps)


def test_robustness_moves_units_to_groups_of_high_visual_sensitivity(model, signals):
    def kept(preference):
        plan = planner_with(signals, preference, pruning_ratio=0.4).plan(model)
        return torch.tensor([g.keep / g.width for g in plan.groups])

    moved = kept(Preference(0, 1, 1)) - kept(Preference(1, 0, 1))
    assert float((moved * signals.visual_rank).sum()) > 0


def test_sensitivity_is_the_kl_of_the_masked_model(model, signals):
    """Group 1 (FFN) at a quarter removed: full forward, no replay."""
    import dataclasses

    plan = random_plan(model)
    kept = tuple(sorted(signals.scores["language.0.ffn"].argsort(descending=True)[: round(44 * 0.75)].tolist()))
    entries = [dataclasses.replace(g, kept=tuple(range(g.width))) for g in plan.groups]
    entries[1] = dataclasses.replace(entries[1], kept=kept)

    def answers():
        rows = []
        for b in BATCHES:
            first = (b["labels"] != -100).int().argmax(1) - 1
            with torch.no_grad():
                logits = model(**{k: v for k, v in b.items() if k != "labels"}).logits
            rows.append(logits[torch.arange(len(first)), first.clamp_min(0)])
        return torch.cat(rows).log_softmax(-1)

    dense = answers()
    with masked(model, PruningPlan(groups=tuple(entries))):
        kl = (dense.exp() * (dense - answers())).sum(-1).mean()
    assert float(signals.sensitivity[1, 0]) == pytest.approx(float(kl), rel=1e-3)


def test_signals_are_kept_until_the_weights_change(model):
    changed = build("llava", seed=5)
    planner = HiPPPlanner(EVEN)
    planner.plan(changed, calibration=BATCHES)
    first = planner.signals
    planner.plan(changed)  # nothing to calibrate on is needed any more
    assert planner.signals is first
    with torch.no_grad():
        changed.model.language_model.layers[0].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(CalibrationError, match="No calibration data"):
        planner.plan(changed)


def test_rounding_is_honoured(model, signals):
    plan = planner_with(signals, pruning_ratio=0.3, bounds=Bounds(round_to=8)).plan(model)
    assert all(g.keep == g.width or g.keep % 8 == 0 for g in plan.groups if g.kind == "ffn")


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan"), 2])
def test_a_ratio_outside_the_range_is_refused_at_once(ratio):
    with pytest.raises(BudgetError, match=r"in \[0, 1\) is needed"):
        HiPPPlanner(EVEN, pruning_ratio=ratio)


def test_an_unreachable_ratio_is_refused(model, signals):
    with pytest.raises(BudgetError, match=r"0\.95 cannot be met .* at most 0\.\d+ can go"):
        planner_with(signals, pruning_ratio=0.95).plan(model)


def test_no_calibration_says_what_to_pass(model):
    with pytest.raises(CalibrationError, match="pass calibration= .* or processor="):
        HiPPPlanner(EVEN).plan(model)
    with pytest.raises(TypeError, match="A Preference is needed"):
        HiPPPlanner((0.4, 0.4, 0.2))  # type: ignore[arg-type]


# fit


@pytest.mark.parametrize("imagined", [0, 10])
def test_fit_learns_what_pays(imagined):
    """With a reward model and without: the one group that matters to this evaluator must be kept more than before."""
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
        planner.fit(model, evaluator, FitSettings(steps=15, preferences=3, rollouts=4, imagined=imagined), progress=False)
    after = planner.plan(model).keep_counts["language.1.ffn"]
    assert after > before + 4


def test_front_holds_no_dominated_plan(model, signals):
    planner = planner_with(signals)
    with pytest.raises(PlanError, match="call fit"):
        planner.front()
    result = planner.fit(model, Closeness(model), SETTINGS, progress=False)
    assert result.evaluations == SETTINGS.evaluations == len(planner.archive) and result.hypervolume > 0
    front = [f.reward.objectives() for f in planner.front()]
    everything = [r.reward.objectives() for r in planner.archive.records]
    for point in front:
        assert not any(all(a >= b for a, b in zip(o, point, strict=True)) and o != point for o in everything)
    for other in everything:
        assert any(all(a >= b for a, b in zip(point, other, strict=True)) for point in front)
    ratios = [f.plan.pruning_ratio for f in planner.front()]
    assert [f.reward.compression for f in planner.front()] == pytest.approx(ratios)


def test_two_answers_to_a_preference(model, signals, tmp_path, capsys):
    planner, evaluator = planner_with(signals, Preference(0.2, 0.6, 0.2)), Closeness(model)
    for ask in (planner.choices, lambda: planner.plan(model, archived=True)):
        with pytest.raises(PlanError, match="no evaluated plan"):
            ask()
    with pytest.raises(PlanError, match="no signals of this model"):
        HiPPPlanner(EVEN).rewards(model, [], evaluator)
    planner.fit(model, evaluator, SETTINGS, progress=False)
    wish = Preference(0.3, 0.3, 0.4)
    choices = answer(planner, wish, model, evaluator)
    assert choices.policy.plan == planner.plan(model, preference=wish)
    with masked(model, choices.policy.plan):
        expected = evaluator(model)
    assert choices.policy.reward.utility == pytest.approx(expected["utility"], abs=1e-5)
    best = choices.archived.reward
    ends = planner.archive.nadir_and_ideal()
    values = [scalarise(torch.tensor(reward.objectives()), torch.tensor(wish.as_tuple()), "tchebycheff", ends)
              for reward in (best, *(r.reward for r in planner.archive.records))]  # fmt: skip
    assert values[0] == max(values)
    assert planner.plan(model, preference=wish, archived=True) == choices.archived.plan
    assert choices.archived.plan.preference == wish.as_tuple()
    planner.pruning_ratio = 0.5
    for at_half in (planner.choices(wish).policy.plan, planner.choices(wish).archived.plan):
        assert at_half.pruning_ratio >= 0.5 - 1e-6
    planner.pruning_ratio = 0.8
    with pytest.raises(PlanError, match="removes 0.8 or more"):
        planner.choices(wish)
    print_front(planner, choices)
    write_picture(planner, choices, tmp_path / "front.png")
    out = capsys.readouterr().out
    assert choices.verdict().split()[0] in out and "best archived" in out
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"
    rows = json.loads(json.dumps(front_rows(planner)))
    assert [r["reward"]["compression"] for r in rows] == [f.reward.compression for f in planner.front()]
    assert [r["keeps"] for r in rows] == [f.plan.keep_counts for f in planner.front()]


def test_an_archive_belongs_to_the_model_it_was_evaluated_on(model, signals, tmp_path):
    planner, other = planner_with(signals), copy.deepcopy(model)
    planner.fit(model, Closeness(model), SETTINGS, progress=False)
    known = planner.choices().archived.plan
    with torch.no_grad():
        next(other.model.language_model.layers[0].mlp.parameters()).mul_(1.1)
    for round_trip in range(2):  # as it was fitted, then as it was when last asked about the other model
        planner.save(tmp_path / str(round_trip))
        planner = HiPPPlanner.load(tmp_path / str(round_trip))
        for ask in (lambda p=planner: p.plan(other, calibration=BATCHES, archived=True), planner.choices, planner.front):
            with pytest.raises(PlanError, match="evaluated on another model"):
                ask()
    # Asked about another model in between, it still knows its own.
    assert planner.plan(model, calibration=BATCHES, archived=True) == known


def test_a_planner_saved_by_an_earlier_version_loads(model, signals, tmp_path):
    planner = planner_with(signals)
    planner.fit(model, Closeness(model), SETTINGS, progress=False)
    planner.save(tmp_path / "planner")
    header = json.loads((tmp_path / "planner" / "planner.json").read_text())
    del header["fitted_on"]
    (tmp_path / "planner" / "planner.json").write_text(json.dumps(header))
    assert HiPPPlanner.load(tmp_path / "planner").front() == planner.front()


def test_rewards_are_for_plans_of_the_planner(model, signals):
    planner = planner_with(signals)
    with pytest.raises(PlanError, match="keeps other units"):
        planner.rewards(model, [random_plan(model)], Closeness(model))


def test_verdicts(model, signals):
    plans = [planner_with(signals, pruning_ratio=r).plan(model) for r in (0.2, 0.4)]
    rewards = [Reward(utility=u, robustness=0.5, compression=0.3, stability=0.0) for u in (0.6, 0.5)]
    tied = Reward(utility=0.4, robustness=0.9, compression=0.3, stability=0.0)

    def verdict(mine, theirs, same=False):
        return Choices(policy=FrontPlan(plan=plans[0], reward=mine),
                       archived=FrontPlan(plan=plans[0 if same else 1], reward=theirs)).verdict()  # fmt: skip

    assert verdict(rewards[0], rewards[1]) == "The policy's plan dominates the archived one."
    assert verdict(rewards[1], rewards[0]).startswith("The archived plan dominates")
    assert verdict(rewards[0], tied) == "Neither dominates the other."
    assert verdict(rewards[0], rewards[0], same=True) == "They are the same plan."
    assert "was not evaluated" in verdict(None, tied)


def test_the_gate_leaves_collapsed_plans_unmeasured(model, signals, tmp_path):
    settings = FitSettings(steps=2, rollouts=2, imagined=3, min_stability=-3.0)
    planner, evaluator = planner_with(signals), Closeness(model)
    planner.fit(model, evaluator, settings, progress=False)
    closed = [r for r in planner.archive.records if r.reward.stability < -3]
    assert 0 < len(closed) < len(planner.archive) and all(r.reward.utility == r.reward.robustness == 0 for r in closed)
    measured = {r.keeps for r in planner.archive.records if r.reward.stability >= -3}
    assert evaluator.calls == 1 + len(measured)  # and the dense model once
    # They save most of all, and are no answer: nobody knows what they achieve.
    assert max(r.reward.compression for r in planner.archive.records) == max(r.reward.compression for r in closed)
    planner.save(tmp_path / "p")
    for known in (planner, HiPPPlanner.load(tmp_path / "p")):
        assert [r.measured for r in known.archive.records] == [r.keeps in measured for r in planner.archive.records]
        assert all(f.reward.utility > 0 for f in known.front())
        assert known.choices(Preference(0, 0, 1)).archived.reward.utility > 0
    nothing = planner_with(signals)
    nothing.fit(model, evaluator, FitSettings(steps=1, rollouts=2, imagined=3, min_stability=0.1), progress=False)
    assert nothing.front() == []
    with pytest.raises(PlanError, match=r"The gate \(min_stability\) kept all 12 plans from being measured"):
        nothing.choices()


@pytest.mark.parametrize("cost", ["flops", "latency"])
def test_compression_counts_what_was_asked(model, signals, tmp_path, cost):
    planner = planner_with(signals)
    planner.fit(model, Closeness(model), SETTINGS, cost=cost, folder=tmp_path, progress=False)
    table = fit_cost(model, signals.groups, cost, tmp_path)
    for record in planner.archive.records:
        expected = float(table.removed(keep_shares(signals.groups, [record.keeps]))[0])
        assert record.reward.compression == pytest.approx(expected)


def test_the_same_seed_gives_the_same_archive(model, signals):
    archives = []
    for seed in (3, 3, 4):
        planner = planner_with(signals)
        planner.fit(model, Closeness(model), FitSettings(steps=2, rollouts=2, imagined=5, seed=seed), progress=False)
        archives.append([r.model_dump() for r in planner.archive.records])
    assert archives[0] == archives[1] != archives[2]


def test_a_fit_leaves_no_trace_in_the_model_or_the_random_state(model, signals):
    state = torch.get_rng_state()
    planner_with(signals).fit(model, Closeness(model), SETTINGS, progress=False)
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
def test_ctrl_c_and_resume_end_like_an_undisturbed_fit(model, signals, tmp_path, at):
    whole = planner_with(signals)
    whole.fit(model, Closeness(model), SETTINGS, folder=tmp_path / "whole", progress=False)
    planner = planner_with(signals)
    with pytest.raises(KeyboardInterrupt):
        planner.fit(model, Interrupting(model, at), SETTINGS, folder=tmp_path / "cut", progress=False)
    evaluator = Closeness(model)
    planner.fit(model, evaluator, SETTINGS, folder=tmp_path / "cut", progress=False)
    assert (tmp_path / "cut/archive.jsonl").read_text() == (tmp_path / "whole/archive.jsonl").read_text()
    assert all(torch.equal(a, b) for a, b in zip(planner.policy.parameters(), whole.policy.parameters(), strict=True))
    # One call measures the dense model; what the interrupted run had evaluated is not evaluated again.
    assert evaluator.calls <= 1 + SETTINGS.evaluations - max(0, at - 1)


def test_a_finished_fit_is_not_repeated_and_can_be_prolonged(model, signals, tmp_path):
    planner_with(signals).fit(model, Closeness(model), SETTINGS, folder=tmp_path, progress=False)
    evaluator, again = Closeness(model), planner_with(signals)
    again.fit(model, evaluator, SETTINGS, folder=tmp_path, progress=False)
    # One call measures the dense model, to see that the evaluator is the same.
    assert evaluator.calls == 1 and len(again.archive) == SETTINGS.evaluations
    longer = FitSettings(**{**SETTINGS.__dict__, "steps": 4})
    shutil.copytree(tmp_path, copied := tmp_path.with_name(tmp_path.name + "-copy"))
    assert again.fit(model, evaluator, longer, folder=tmp_path, progress=False).steps == 4
    # By a planner that has learned already, or by a new one with another seed: what the fit began with lies in its folder.
    new = planner_with(signals, seed=1)
    new.fit(model, evaluator, longer, folder=copied, progress=False)
    assert [r.keeps for r in new.archive.records] == [r.keeps for r in again.archive.records]
    assert all(torch.equal(a, b) for a, b in zip(new.policy.parameters(), again.policy.parameters(), strict=True))


KILLED = """
    import sys; sys.path[:0] = [{tests!r}, {tests!r} + "/planner"]
    import torch; torch.set_num_threads(1)
    from models import build
    from test_planner import BATCHES, EVEN, Closeness, planner_with
    from hipp_ext.planner.fit import FitSettings
    from hipp_ext.planner.state import measure_signals
    model = build("llava")
    planner = planner_with(measure_signals(model, BATCHES))
    print("ready", flush=True)
    planner.fit(model, Closeness(model), FitSettings(steps=12, preferences=2, budgets=2, rollouts=2, imagined=3, seed=3),
                folder={folder!r}, progress=False)
    print("done", flush=True)
"""


def test_kill_9_during_a_fit_and_resume(tmp_path):
    def start(folder):
        script = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parents[1]), folder=str(folder))
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], stdout=subprocess.PIPE)
        assert process.stdout and process.stdout.readline() == b"ready\n"
        return process

    assert start(tmp_path / "whole").wait() == 0
    for delay in (0.15, 0.4):
        process = start(tmp_path / "cut")
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "cut").wait() == 0
    assert (tmp_path / "cut/archive.jsonl").read_text() == (tmp_path / "whole/archive.jsonl").read_text()


def test_half_a_line_at_the_end_of_the_archive_is_dropped(model, signals, tmp_path):
    planner_with(signals).fit(model, Closeness(model), SETTINGS, folder=tmp_path, progress=False)
    path = tmp_path / "archive.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert len(Archive(path)) == SETTINGS.evaluations
    planner_with(signals).fit(model, Closeness(model), SETTINGS, folder=tmp_path, progress=False)
    assert path.read_text() == whole
    path.write_text(whole[:40] + "\n" + whole)
    with pytest.raises(CheckpointError, match="line 1, is not a record"):
        Archive(path)


def test_a_folder_of_another_fit_is_refused(model, signals, tmp_path):
    planner_with(signals).fit(model, Closeness(model), SETTINGS, folder=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="fit with other settings"):
        planner_with(signals).fit(model, Closeness(model), FitSettings(steps=3, seed=9), folder=tmp_path, progress=False)

    class Other(Closeness):
        def __call__(self, model):
            return {name: value / 2 for name, value in super().__call__(model).items()}

    with pytest.raises(CheckpointError, match="with another evaluator"):
        planner_with(signals).fit(model, Other(model), SETTINGS, folder=tmp_path, progress=False)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x00" * 9)
    with pytest.raises(CheckpointError, match="is damaged"):
        planner_with(signals).fit(model, Closeness(model), SETTINGS, folder=tmp_path, progress=False)


@pytest.mark.parametrize("answer", [{}, {"utility": 1.0}, {"utility": float("nan"), "robustness": 0.0}, 3.0, None])
def test_an_evaluator_that_returns_something_else_is_refused(model, signals, answer):
    with pytest.raises(DataError, match="must return finite numbers"):
        planner_with(signals).fit(model, lambda m: answer, SETTINGS, progress=False)


@pytest.mark.parametrize(
    "bad",
    [{"steps": -1}, {"rollouts": 1}, {"preferences": 0}, {"budgets": 0}, {"noise": (0.0, 0.0)}, {"noise": (0.7, float("nan"))},
     {"budget_noise": 0.0}, {"learning_rate": -1.0}, {"scalarisation": "best"}],
)  # fmt: skip
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match=r"(are|is) needed"):
        FitSettings(**bad)


# save and load


def test_a_saved_planner_plans_the_same(model, signals, tmp_path):
    planner = planner_with(signals, Preference(0.5, 0.3, 0.2), bounds=Bounds(round_to=2, min_keep=0.2))
    planner.fit(model, Closeness(model), SETTINGS, progress=False)
    planner.save(tmp_path / "p")
    loaded = HiPPPlanner.load(tmp_path / "p")
    assert loaded.plan(model) == planner.plan(model)  # no calibration: the signals came along
    assert [f.plan for f in loaded.front()] == [f.plan for f in planner.front()]
    assert loaded.preference == planner.preference and loaded.bounds == planner.bounds


def test_an_unfitted_planner_can_be_saved_too(tmp_path):
    HiPPPlanner(EVEN, pruning_ratio=0.25).save(tmp_path / "p")
    assert HiPPPlanner.load(tmp_path / "p").pruning_ratio == 0.25


@pytest.mark.parametrize("file", ["planner.json", "policy.safetensors", "signals.safetensors"])
def test_a_damaged_planner_folder_is_refused(model, signals, tmp_path, file):
    planner_with(signals).save(tmp_path / "p")
    content = (tmp_path / "p" / file).read_bytes()
    (tmp_path / "p" / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="not a complete planner folder"):
        HiPPPlanner.load(tmp_path / "p")
    (tmp_path / "p" / file).unlink()
    with pytest.raises(CheckpointError, match="not a complete planner folder"):
        HiPPPlanner.load(tmp_path / "p")


def test_an_archive_that_lost_plans_is_refused(model, signals, tmp_path):
    planner = planner_with(signals)
    planner.fit(model, Closeness(model), SETTINGS, progress=False)
    planner.save(tmp_path / "p")
    lines = (tmp_path / "p" / "archive.jsonl").read_text().splitlines(keepends=True)
    for left in (len(lines) // 2, 0):
        (tmp_path / "p" / "archive.jsonl").write_text("".join(lines[:left]))
        with pytest.raises(CheckpointError, match=f"holds {left} of {len(lines)} plans"):
            HiPPPlanner.load(tmp_path / "p")
    (tmp_path / "p" / "archive.jsonl").unlink()
    with pytest.raises(CheckpointError, match=f"holds 0 of {len(lines)} plans"):
        HiPPPlanner.load(tmp_path / "p")


def test_scorers_with_settings_of_their_own_are_given_again(model, tmp_path):
    labelled = [batch("llava", labels=True)]
    ways = {"scorer": MRS("grad", attack_steps=1), "mrs": MRS(attack_steps=1)}
    for argument, scorer in ways.items():
        planner = HiPPPlanner(EVEN, pruning_ratio=0.3, **{argument: scorer})
        plan = planner.plan(model, calibration=labelled)
        planner.save(tmp_path / argument)
        with pytest.raises(PlanError, match=rf"saved with {argument}=MRS .*: give it again"):
            HiPPPlanner.load(tmp_path / argument)
        other: dict = {argument: MRS()}
        with pytest.raises(PlanError, match=f"saved with {argument}=MRS .*, not MRS"):
            HiPPPlanner.load(tmp_path / argument, **other)
        loaded = HiPPPlanner.load(tmp_path / argument, **{argument: scorer})
        assert loaded.plan(model) == plan and getattr(loaded, argument) is scorer


# the parts of GRPO


def test_advantages_ignore_what_is_constant_and_weigh_the_rest():
    rewards = torch.zeros(2, 1, 3, 3)
    rewards[..., 0] = torch.tensor([0.2, 0.4, 0.6])  # utility
    rewards[..., 1] = 0.5 + 1e-6 * torch.tensor([1.0, -1.0, 0.0])  # robustness: below the noise floor
    rewards[..., 2] = 0.3  # compression: fixed by the budget
    advantages = allocation_advantages(rewards, torch.tensor([[1.0, 0, 0], [0.0, 1, 0]]))
    # z-scores of utility, times its share in the preference, which is never all nor nothing; robustness adds nothing.
    scores = torch.tensor([-1.2247, 0, 1.2247])
    assert torch.allclose(advantages[:, 0], scores * torch.tensor([[1.05], [0.05]]) / 1.1, atol=1e-3)


def test_budget_advantages_follow_the_preference(signals):
    rewards = torch.zeros(2, 2, 2, 3)
    rewards[:, 0] = torch.tensor([0.9, 0.9, 0.1])
    rewards[:, 1] = torch.tensor([0.5, 0.5, 0.5])
    for kind in ("linear", "tchebycheff"):
        learner = Learner(new_policy(), signals, 1e-3, kind)
        advantages = learner.budget_advantages(rewards, torch.tensor([[0.5, 0.5, 0.0], [0.05, 0.05, 0.9]]))
        assert advantages[0, 0] > advantages[0, 1] and advantages[1, 0] < advantages[1, 1]


def test_tchebycheff_reaches_what_linear_cannot():
    """A point of a concave front that no linear weighting prefers to both ends."""
    front = torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.4, 0.0], [0.0, 1.0, 0.0]])
    even = torch.tensor([0.5, 0.5, 0.0]).expand(3, 3)
    assert int(scalarise(front, even, "linear").argmax()) != 1
    assert int(scalarise(front, even, "tchebycheff").argmax()) == 1


def test_weights_count_in_units_of_what_is_at_stake(signals):
    """Half of the weight on robustness brings it half way, though it falls by 0.06 in all and compression rises by 0.6."""
    learner, even = Learner(new_policy(), signals, 1e-3, "tchebycheff"), torch.tensor([0.0, 0.5, 0.5]).expand(7, 3)
    ratios = torch.linspace(0, 0.6, 7)
    objectives = torch.stack([1 - ratios, 0.9 - 0.1 * ratios, ratios], 1)
    assert int(learner.value(objectives, even).argmax()) >= 5
    learner.ends = archive_of(objectives.tolist()).nadir_and_ideal()
    assert learner.ends.tolist() == [pytest.approx(row) for row in ([0.4, 0.84, 0.0], [1.0, 0.9, 0.6])]
    assert int(learner.value(objectives, even).argmax()) == 3


def test_what_hardly_varies_is_left_on_its_whole_scale():
    assert torch.equal(Archive().nadir_and_ideal(), WHOLE)
    one_budget = archive_of([[0.9, 0.8, 0.3], [0.5, 0.7, 0.301], [0.6, 0.6, 0.302]])
    assert torch.equal(one_budget.nadir_and_ideal(), WHOLE)
    nadir, ideal = archive_of([[0.9, 0.80, 0.1], [0.5, 0.84, 0.3], [0.7, 0.79, 0.5]]).nadir_and_ideal()
    assert nadir.tolist() == pytest.approx([0.7, 0.79, 0]) and ideal.tolist() == pytest.approx([0.9, 0.84, 0.5])
    nadir, ideal = archive_of([[0.9, 0.80, 0.1], [0.7, 0.795, 0.5]]).nadir_and_ideal()
    assert nadir.tolist() == pytest.approx([0.7, 0, 0]) and ideal.tolist() == pytest.approx([0.9, 1, 0.5])


def test_preferences_cover_the_simplex():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw_preferences(8, generator) for _ in range(100)])
    assert torch.allclose(drawn.sum(1), torch.ones(len(drawn))) and (drawn >= 0).all()
    assert (drawn.mean(0) - 1 / 3).abs().max() < 0.05 and (drawn.max(0).values > 0.9).all()


def archive_of(objectives) -> Archive:
    archive = Archive()
    archive.append([
        Record(step=0, index=i, preference=(1, 0, 0), pruning_ratio=0.1, allocation=(0.0,), keeps=(i,),
               reward=Reward(utility=u, robustness=r, compression=c, stability=0.0))
        for i, (u, r, c) in enumerate(objectives)
    ])  # fmt: skip
    return archive


def test_hypervolume_and_front_of_a_small_archive():
    archive = archive_of([(1.0, 0.5, 0.1), (0.5, 1.0, 0.1), (0.4, 0.4, 0.05), (0.5, 0.5, 0.5)])
    assert {r.index for r in archive.front()} == {0, 1, 3}
    assert archive.hypervolume() == pytest.approx(0.5 * 0.5 * 0.5 + 2 * 0.5 * 0.5 * 0.1)


def test_find_groups_order_is_that_of_the_signals(model, signals):
    assert signals.groups == find_groups(model)
    assert signals.state.shape[0] == 6 and torch.isfinite(signals.state).all()


def test_logits_cannot_drift_together(signals):
    """No plan changes when all logits move by the same, so nothing but the policy itself can hold them."""
    policy, preferences, ratios = new_policy(), draw_preferences(5, torch.Generator().manual_seed(0)), torch.full((5,), 0.3)
    prior = policy.allocation(signals, preferences, ratios)
    with torch.no_grad():
        policy.allocation_head.weight.normal_(std=30.0)
        policy.allocation_head.bias.fill_(1e4)
    logits = policy.allocation(signals, preferences, ratios)
    assert (logits - prior).abs().mean() > 1
    assert torch.allclose(logits.mean(1), prior.mean(1), atol=1e-3)


def test_what_is_common_to_a_rollouts_logits_teaches_nothing(signals):
    learned = []
    for shifted in (False, True):
        learner = Learner(new_policy(), signals, 1e-2, "tchebycheff")
        generator = torch.Generator().manual_seed(1)
        rollouts = learner.draw(draw_preferences(4, generator), 2, 6, noise=0.5, budget_noise=0.5, ratio=0.3, limit=0.6,
                                generator=generator)  # fmt: skip
        objectives = torch.rand(4, 2, 6, 3, generator=generator)
        if shifted:
            rollouts.allocations.add_(20 * torch.randn(4, 2, 6, 1, generator=generator))
        learner.learn(rollouts, objectives, budget=False)
        learned.append(learner.policy.allocation_head.weight.detach().clone())
    assert learned[0].abs().max() > 1e-3
    assert torch.allclose(*learned, rtol=1e-2, atol=1e-5)


def test_logits_that_no_plan_depends_on_come_back(signals):
    """Logits so far apart that rollouts differ by noise alone: nothing is learned there, and nothing but the KL holds them."""
    learner, generator = Learner(new_policy(), signals, 3e-3, "tchebycheff"), torch.Generator().manual_seed(2)
    preferences, ratios = draw_preferences(4, generator), torch.full((4, 1), 0.3)
    prior = learner.allocation_means(preferences, ratios)

    def apart() -> float:
        return (learner.allocation_means(preferences, ratios) - prior).abs().mean().item()

    with torch.no_grad():
        learner.policy.allocation_head.weight.normal_(std=3.0, generator=generator)
    before = apart()
    for _ in range(200):
        rollouts = learner.draw(preferences, 1, 6, noise=0.3, budget_noise=0.5, ratio=0.3, limit=0.6, generator=generator)
        learner.learn(rollouts, torch.rand(4, 1, 6, 3, generator=generator), budget=False)
    assert before > 3 and apart() < before


def test_a_policy_that_went_astray_is_brought_back(model, signals):
    planner = planner_with(signals)
    evaluator = Closeness(model)
    with plan_rewards(model, evaluator, signals, measure_cost(model, signals.groups, "parameters")) as measure:
        settings = FitSettings(steps=1, preferences=2, budgets=2, rollouts=2, imagined=5, final=2.0, seed=3)
        trainer = Trainer(planner.policy, signals, lambda plans: [measure(k) for k in plans], settings,
                          cost=measure_cost(model, signals.groups, "parameters"))  # fmt: skip
        with torch.no_grad():
            planner.policy.allocation_head.weight.normal_(std=1e3)
            planner.policy.budget_head.bias.fill_(-50)
        trainer.run_step()
    ratio, allocation = planner.policy.decide(signals, Preference(1, 1, 8))
    assert ratio > 0.1 and max(map(abs, allocation)) < 10
