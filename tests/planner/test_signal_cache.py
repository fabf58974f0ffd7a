"""Signals on disk: found again by the same model and calibration, by no other, and never a reason to fail."""

import pytest
import torch
from models import batch, build

from hipp_ext import HiPPPlanner, Preference
from hipp_ext.scorers import Magnitude

BATCHES = [batch("llava", size=2, labels=True)]


def plan(model, folder, said, calibration=BATCHES, **options):
    made = HiPPPlanner(Preference(1, 1, 1), cache=folder, **options)
    return made.plan(model, calibration=calibration, say=said.append), made.signals


def test_another_process_finds_what_was_measured(tmp_path):
    first, second = [], []
    before, measured = plan(build("llava"), tmp_path, first)
    after, found = plan(build("llava"), tmp_path, second)
    assert any("measuring" in line for line in first)
    assert len(second) == 1 and "as measured before" in second[0]
    assert after == before
    assert torch.equal(found.state, measured.state) and found.groups == measured.groups
    assert all(torch.equal(found.scores[n], s) for n, s in measured.scores.items())
    assert (found.digest, found.calibration, found.scorer) == (measured.digest, measured.calibration, measured.scorer)


@pytest.mark.parametrize("part", ["model.language_model.layers.1.mlp.up_proj", "model.multi_modal_projector.linear_1"])
def test_other_weights_are_measured_anew(tmp_path, part):
    plan(build("llava"), tmp_path, [])
    changed, said = build("llava"), []
    with torch.no_grad():
        changed.get_submodule(part).weight.mul_(1.5)
    plan(changed, tmp_path, said)
    assert any("measuring" in line for line in said) and len(list(tmp_path.iterdir())) == 2


def test_other_calibration_is_measured_anew(tmp_path):
    plan(build("llava"), tmp_path, [])
    said = []
    plan(build("llava"), tmp_path, said, [batch("llava", size=2, seed=1, labels=True)])
    assert any("measuring" in line for line in said) and len(list(tmp_path.iterdir())) == 2


def test_a_scorer_of_ones_own_is_not_cached(tmp_path):
    plan(build("llava"), tmp_path, [], scorer=Magnitude())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [b"", b"nothing like it", None])
def test_a_damaged_file_costs_only_the_measurement(tmp_path, damage):
    before, _ = plan(build("llava"), tmp_path, [])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    said = []
    assert plan(build("llava"), tmp_path, said)[0] == before
    assert "is damaged" in said[0]
    said.clear()
    plan(build("llava"), tmp_path, said)
    assert "as measured before" in said[0]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    said = []
    plan(build("llava"), tmp_path / "file", said)
    assert "signals are not kept" in said[-1]
