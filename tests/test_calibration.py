"""Calibration: one object, made and checked once at the boundary, passed on as it is."""

import pytest
import torch
from models import batch, build

import hipp_ext
from hipp_ext import Calibration, HiPPPlanner, Preference
from hipp_ext.errors import CalibrationError
from hipp_ext.scorers import MRS, WandaSP
from hipp_ext.surgery.prune import prune

BATCHES = [batch("llava", size=2, seed=s, labels=True) for s in (1, 2, 3)]


@pytest.fixture
def checks(monkeypatch):
    """Indices of the batches that were checked."""
    from hipp_ext.calibration import calibration

    check, checked = calibration.check_batch, []
    monkeypatch.setattr(
        calibration, "check_batch", lambda m, b, i: (checked.append(i), check(m, b, i))
    )
    return checked


def test_a_whole_plan_checks_every_batch_once(checks, tmp_path):
    model = build("llava")
    tasks = {"utility": BATCHES[:2], "robustness": BATCHES[2:]}
    planner = HiPPPlanner(Preference(1, 1, 1), mrs=MRS(attack_steps=0), cache=tmp_path)
    plan = planner.plan(model, calibration=tasks)
    assert checks == [0, 1, 0]
    calibration = Calibration.from_batches(tasks)
    for _ in range(2):
        assert planner.plan(model, calibration=calibration) == plan
    WandaSP()(model, calibration)
    prune(model, plan, reconstruct=True, calibration=calibration)
    assert checks == [0, 1, 0] * 2, "once for every object"


def test_a_calibration_is_checked_for_every_kind_of_model(checks):
    calibration = Calibration.from_batches(BATCHES[:1])
    for _ in range(2):
        assert Calibration.of(build("llava"), calibration) is calibration
    with pytest.raises(CalibrationError, match="LlamaForCausalLM has no image token"):
        WandaSP()(build("llama"), calibration)
    assert checks == [0, 0]


def test_batches_of_both_tasks_are_counted_once():
    calibration = Calibration.from_batches(iter(BATCHES))
    assert calibration.by_task["utility"] is calibration.by_task["robustness"]
    assert len(calibration.batches) == 3 and calibration.rows == 6 and not calibration.skipped
    apart = Calibration.from_batches({"utility": BATCHES[:1], "robustness": BATCHES[1:]})
    assert [id(b["input_ids"]) for b in apart.batches] == [id(b["input_ids"]) for b in BATCHES]
    assert (
        calibration.digest == Calibration.from_batches(dict.fromkeys(apart.by_task, BATCHES)).digest
    )
    assert calibration.digest != apart.digest


def test_what_is_no_calibration_is_refused():
    with pytest.raises(CalibrationError, match="pass \\[batch\\] for a single one"):
        Calibration.from_batches(BATCHES[0])
    with pytest.raises(CalibrationError, match="has batches for utility and robustness; got"):
        Calibration.from_batches({"utility": BATCHES})
    with pytest.raises(CalibrationError, match="holds no batches"):
        Calibration.from_batches([])
    with pytest.raises(CalibrationError, match="is a dict of the tensors .*; got a Tensor"):
        Calibration.from_batches([torch.ones(2)])


def test_it_is_exported_at_the_top():
    assert hipp_ext.Calibration is Calibration and "Calibration" in hipp_ext.__all__
