"""The planner on tiny models: what a preference does, what is refused, and that it can be saved."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
import torch
from fitting import BATCHES, EVEN, SETTINGS, Closeness, fitted, planner_with
from models import batch, build
from plans import random_plan

from hipp_ext import HiPPPlanner, Preference, PruningPlan, masked
from hipp_ext.budget import Bounds
from hipp_ext.errors import BudgetError, CalibrationError, CheckpointError, PlanError
from hipp_ext.groups import find_groups
from hipp_ext.planner.policy import MAX_RATIO
from hipp_ext.planner.settings import FitSettings
from hipp_ext.planner.state import measure_signals
from hipp_ext.scorers import MRS, VisualSensitivity


def test_a_plan_meets_the_ratio_and_leaves_the_model_alone(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = HiPPPlanner(Preference(0.4, 0.4, 0.2), pruning_ratio=0.3).plan(
        model, calibration=BATCHES
    )
    assert (
        all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not model.training
    )
    largest = max(g.unit_parameters for g in plan.groups)
    total = sum(g.width * g.unit_parameters for g in plan.groups)
    assert 0.3 <= plan.pruning_ratio < 0.3 + largest / total
    assert plan.preference == pytest.approx((0.4, 0.4, 0.2)) and plan.scorer == "WandaSP"


@pytest.mark.parametrize("name", ["llava_gqa", "qwen2_5_vl", "smolvlm", "llama", "qwen3"])
def test_other_models(name):
    plan = HiPPPlanner(EVEN, pruning_ratio=0.4).plan(build(name), calibration=[batch(name)])
    assert plan.pruning_ratio >= 0.4 and len(plan.groups) == 6


def test_the_weight_of_compression_sets_the_budget(model, signals):
    ratios = [
        planner_with(signals, Preference(1 - c, 1 - c, 2 * c)).plan(model).pruning_ratio
        for c in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert ratios == sorted(ratios) and ratios[0] < 0.05 and ratios[-1] > MAX_RATIO - 0.05


def test_the_untrained_policy_follows_measured_sensitivity(model, signals):
    plan = planner_with(signals, Preference(1, 0, 1), pruning_ratio=0.4).plan(model)
    wanted = signals.prior(torch.tensor([0.4]), torch.tensor([0.0]))[0]
    for kind in ("attention", "ffn"):
        rows = [
            (float(wanted[i]), g.keep / g.width)
            for i, g in enumerate(plan.groups)
            if g.kind == kind
        ]
        keeps = [keep for _, keep in sorted(rows)]
        assert keeps == sorted(keeps)


def test_robustness_moves_units_to_groups_of_high_visual_sensitivity(model, signals):
    def kept(preference):
        plan = planner_with(signals, preference, pruning_ratio=0.4).plan(model)
        return torch.tensor([g.keep / g.width for g in plan.groups])

    moved = kept(Preference(0, 1, 1)) - kept(Preference(1, 0, 1))
    assert float((moved * signals.visual_rank).sum()) > 0


def test_sensitivity_is_the_kl_of_the_masked_model(model):
    """Group 1 (FFN) dropped: full forward, no replay."""
    signals = measure_signals(model, BATCHES, effort="measured")
    entries = list(random_plan(model).groups)
    entries = [dataclasses.replace(g, kept=tuple(range(g.width))) for g in entries]
    entries[1] = dataclasses.replace(entries[1], kept=())

    def outputs():
        rows = []
        for b in BATCHES:
            predicts = torch.nn.functional.pad(b["labels"][:, 1:] != -100, (0, 1))
            with torch.no_grad():
                logits = model(**{k: v for k, v in b.items() if k != "labels"}).logits
            rows.append(logits[predicts])
        return torch.cat(rows).log_softmax(-1)

    dense = outputs()
    with masked(model, PruningPlan(groups=tuple(entries))):
        kl = (dense.exp() * (dense - outputs())).sum(-1).mean()
    assert signals.sensitivity[:, 1, -1].tolist() == pytest.approx([float(kl)] * 2, rel=1e-3)


def test_a_group_of_one_unit_is_the_last_to_go():
    model = build("llava_mqa")
    signals = measure_signals(model, [batch("llava_mqa", labels=True)])
    single = torch.tensor([g.width == 1 for g in signals.groups])
    assert single.any() and not single.all()
    assert (signals.sensitivity[..., -1] > 0).all(), "dropping its block has a loss of its own"
    ratios, even = torch.tensor([0.1, 0.4]), torch.tensor([0.5, 0.5])
    logits = signals.within(Bounds()).prior(ratios, even)
    assert (logits[:, single].amin(1) >= logits[:, ~single].amax(1)).all()


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


def test_what_is_no_model_preference_or_seed_is_named():
    planner = HiPPPlanner(EVEN)
    for ask in (planner.plan, planner.measure, lambda m: planner.fit(m, lambda _: {})):
        with pytest.raises(
            TypeError, match=r"not the path 'mine': load it with hipp_ext\.load_pruned\('mine'\)"
        ):
            ask("mine")
        with pytest.raises(TypeError, match="A transformers model is needed, not int"):
            ask(3)
    with pytest.raises(TypeError, match="A Preference is needed, not 0.3"):
        planner.plan(build("llama"), preference=0.3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Bounds are needed"):
        HiPPPlanner(EVEN, bounds=8)  # type: ignore[arg-type]
    for seed in (1.5, True, "1", -1):
        with pytest.raises(PlanError, match="seed=.*a whole number of 0 or more is needed"):
            HiPPPlanner(EVEN, seed=seed)  # type: ignore[arg-type]
    for ratio in (True, "0.3", math.nan, 1):
        with pytest.raises(BudgetError, match=r"a number in \[0, 1\) is needed"):
            HiPPPlanner(EVEN, pruning_ratio=ratio)
    same = HiPPPlanner(EVEN, seed=np.int64(3), pruning_ratio=np.float32(0.25))
    assert same.pruning_ratio == 0.25 and all(
        torch.equal(a, b)
        for a, b in zip(
            same.policy.parameters(), HiPPPlanner(EVEN, seed=3).policy.parameters(), strict=True
        )
    )


def test_a_saved_planner_plans_the_same(model, signals, tmp_path):
    planner = planner_with(
        signals, Preference(0.5, 0.3, 0.2), bounds=Bounds(round_to=2, min_keep=0.2)
    )
    planner.fit(model, Closeness(model), SETTINGS, progress=False)
    planner.save(tmp_path / "p")
    loaded = HiPPPlanner.load(tmp_path / "p")
    assert loaded.plan(model) == planner.plan(model)  # no calibration: the signals came along
    assert [f.plan for f in loaded.front()] == [f.plan for f in planner.front()]
    assert loaded.preference == planner.preference and loaded.bounds == planner.bounds


@pytest.mark.parametrize("least", [np.float32(0.25), {"language.1.ffn": np.float64(0.5)}])
def test_floors_may_be_numbers_of_numpy(tmp_path, least):
    HiPPPlanner(EVEN, bounds=Bounds(min_keep=least)).save(tmp_path / "p")
    assert HiPPPlanner.load(tmp_path / "p").bounds == Bounds(min_keep=least)


def test_an_archive_that_is_no_text_is_refused(tmp_path):
    HiPPPlanner(EVEN).save(tmp_path / "p")
    (tmp_path / "p" / "archive.jsonl").write_bytes(b"\xff\xfe\n{}\n")
    with pytest.raises(CheckpointError, match="is not a record"):
        HiPPPlanner.load(tmp_path / "p")


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


def test_a_flipped_bit_in_a_planner_folder_never_gives_another_plan(model, signals, tmp_path):
    planner, rng = planner_with(signals, pruning_ratio=0.4), random.Random(0)
    planner.fit(
        model, Closeness(model), FitSettings(steps=1, preferences=1, updates=2), progress=False
    )
    planner.save(tmp_path / "p")
    before, front, same = planner.plan(model), [f.reward for f in planner.front()], 0
    for path in sorted((tmp_path / "p").iterdir()):
        content = path.read_bytes()
        for _ in range(40):
            bit = rng.randrange(8 * len(content))
            path.write_bytes(
                content[: bit // 8]
                + bytes([content[bit // 8] ^ 1 << bit % 8])
                + content[bit // 8 + 1 :]
            )
            try:
                loaded = HiPPPlanner.load(tmp_path / "p")
            except CheckpointError:
                continue
            same += 1
            assert loaded.plan(model) == before and [f.reward for f in loaded.front()] == front
        path.write_bytes(content)
    assert same < 10


def test_files_of_two_planners_are_no_planner(tmp_path):
    for seed in range(2):
        HiPPPlanner(EVEN, seed=seed).save(tmp_path / str(seed))
    (tmp_path / "0/policy.safetensors").write_bytes(
        (tmp_path / "1/policy.safetensors").read_bytes()
    )
    with pytest.raises(
        CheckpointError, match=r"policy\.safetensors is not the file that planner\.json names"
    ):
        HiPPPlanner.load(tmp_path / "0")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("preference", [-1, 1, 1]),
        ("pruning_ratio", 1.5),
        ("bounds", {"round_to": 0}),
        ("bounds", {"min_keep": 7.0}),
        ("plans", "many"),
        ("new", 1),
    ],
)
def test_a_header_that_says_what_cannot_be_is_refused(tmp_path, field, value):
    HiPPPlanner(EVEN).save(tmp_path / "p")
    header = tmp_path / "p" / "planner.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match="not a complete planner folder"):
        HiPPPlanner.load(tmp_path / "p")


def test_a_folder_of_another_version_is_refused(tmp_path):
    HiPPPlanner(EVEN).save(tmp_path / "p")
    header = tmp_path / "p" / "planner.json"
    header.write_text(header.read_text().replace('"format": 1', '"format": 5'))
    with pytest.raises(CheckpointError, match="planner folder of this version"):
        HiPPPlanner.load(tmp_path / "p")


def test_an_archive_that_lost_plans_is_refused(model, signals, tmp_path):
    planner = fitted(model, signals)
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
    ways = [
        ("scorer", MRS(form="grad", attack_steps=1)),
        ("mrs", MRS(attack_steps=1)),
        ("scorer", VisualSensitivity(sink_threshold=5.0)),
    ]
    for argument, scorer in ways:
        planner = HiPPPlanner(EVEN, pruning_ratio=0.3, **{argument: scorer})
        plan = planner.plan(model, calibration=labelled)
        folder, name = tmp_path / scorer.name, type(scorer).__name__
        planner.save(folder)
        with pytest.raises(PlanError, match=rf"saved with {argument}={name} .*: give it again"):
            HiPPPlanner.load(folder)
        other: dict = {argument: type(scorer)()}
        with pytest.raises(PlanError, match=f"saved with {argument}={name} .*, not {name}"):
            HiPPPlanner.load(folder, **other)
        loaded = HiPPPlanner.load(folder, **{argument: scorer})
        assert loaded.plan(model) == plan and getattr(loaded, argument) is scorer


def test_find_groups_order_is_that_of_the_signals(model, signals):
    assert signals.groups == find_groups(model)
    assert signals.state.shape[0] == 6 and torch.isfinite(signals.state).all()
