"""Signals: found on disk by the same model and calibration and by no other; MRS among them where it
is asked for.
"""

import random
from dataclasses import replace

import pytest
import torch
from command import hipp
from devices import LiveBytes
from models import batch, build
from pydantic import ValidationError

from hipp_ext import HiPPPlanner, Preference, testbed
from hipp_ext.calibration import Calibration
from hipp_ext.errors import CalibrationError, CheckpointError, PlanError
from hipp_ext.evals.studies.shapes import noise, random_llava
from hipp_ext.groups import find_groups
from hipp_ext.modes import training_only
from hipp_ext.plan import PruningPlan
from hipp_ext.planner.signal_cache import SignalsHeader, read_signals, signal_tensors
from hipp_ext.planner.state import FEATURES, measure_signals, model_digest
from hipp_ext.scorers import MRS, ExpertUse, Magnitude, VisualSensitivity, WandaSP, says_all
from hipp_ext.scorers.base import forward, forward_hidden
from hipp_ext.sensitivity.efforts import measure_sensitivity

BATCHES = [batch("llava", size=2, labels=True)]


def plan(model, folder, said, calibration=BATCHES, **options):
    made = HiPPPlanner(Preference(1, 1, 1), cache=folder, **options)
    return made.plan(model, calibration=calibration, log=said.append), made.signals


def test_another_process_finds_what_was_measured(tmp_path):
    first, second = [], []
    before, measured = plan(build("llava"), tmp_path, first)
    after, found = plan(build("llava"), tmp_path, second)
    assert any("measuring" in line for line in first)
    assert len(second) == 1 and "as measured before" in second[0]
    assert after == before
    assert torch.equal(found.state, measured.state) and found.groups == measured.groups
    assert all(torch.equal(found.scores[n], s) for n, s in measured.scores.items())
    assert (found.digest, found.calibration, found.scorer) == (
        measured.digest,
        measured.calibration,
        measured.scorer,
    )


@pytest.mark.parametrize(
    "part", ["model.language_model.layers.1.mlp.up_proj", "model.multi_modal_projector.linear_1"]
)
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


def test_another_calibration_is_not_answered_for_by_the_signals_at_hand():
    model, said = build("llava"), []
    other = [batch("llava", size=3, seed=5, labels=True)]
    fresh = [
        HiPPPlanner(Preference(1, 1, 1), pruning_ratio=0.4, cache=None).plan(model, calibration=c)
        for c in (BATCHES, other)
    ]
    planner = HiPPPlanner(Preference(1, 1, 1), pruning_ratio=0.4, cache=None)
    again = [planner.plan(model, calibration=c, log=said.append) for c in (BATCHES, other)]
    assert again == fresh and fresh[0] != fresh[1]
    assert said.count("another calibration than that of the known signals: measuring again") == 1
    said.clear()
    assert (
        planner.plan(model, log=said.append)
        == fresh[1]
        == planner.plan(model, calibration=iter(other), log=said.append)
    )
    assert not said


def test_more_rows_are_another_calibration_and_no_rows_are_none(signals, monkeypatch):
    model, processor = testbed.load()
    groups, asked = find_groups(model), []

    def measured(model, given, *_, **__):
        asked.append(len([row for batch in given.batches for row in batch["input_ids"]]))
        return replace(
            signals, groups=groups, digest=model_digest(model, groups), calibration=given.digest
        )

    monkeypatch.setattr("hipp_ext.planner.planner.cached_signals", measured)
    planner = HiPPPlanner(Preference(1, 0, 0))
    for options in (
        {"processor": processor, "rows": 4},
        {},
        {"processor": processor},
        {"rows": 4},
        {"rows": 6},
        {},
    ):
        planner.measure(model, **options)
    assert asked == [4, 6]


def test_python_keeps_signals_where_the_commands_do_unless_told_not_to(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for off in (None, False):
        HiPPPlanner(Preference(1, 1, 1), cache=off).plan(build("llava"), calibration=BATCHES)
        assert not list(tmp_path.iterdir())
    said = []
    for _ in range(2):
        HiPPPlanner(Preference(1, 1, 1)).plan(build("llava"), calibration=BATCHES, log=said.append)
    assert len(list((tmp_path / "hipp-ext").iterdir())) == 1 and "as measured before" in said[-1]


def test_lines_tell_how_far_it_is_where_there_is_no_terminal(monkeypatch, capsys):
    measure_signals(build("llava"), BATCHES, progress=True)
    assert capsys.readouterr().err == "", "what takes seconds needs no lines"
    monkeypatch.setattr("hipp_ext.progress.FIRST", 0.0)
    monkeypatch.setattr("hipp_ext.progress.EVERY", 0.0)
    measure_signals(build("llava"), BATCHES, progress=True)
    lines = capsys.readouterr().err.splitlines()
    batches, points = len(BATCHES), 6 * len(BATCHES)
    assert lines == [
        *(
            f"hipp: sensitivity by a backward pass, batch {n} of {batches}, about 1 min left"
            for n in range(1, batches)
        ),
        *(
            f"hipp: measuring sensitivity, point {n} of {points}, about 1 min left"
            for _ in ("a half", "all")
            for n in range(1, points)
        ),
    ]


def test_each_task_is_measured_on_its_own_batches(tmp_path):
    tasks = {
        "utility": [batch("llava", size=2)],
        "robustness": [batch("llava", size=3, seed=1), batch("llava", size=1, seed=2)],
    }
    model = build("llava")
    apart = measure_signals(model, tasks)
    for index, batches in enumerate(tasks.values()):
        alone = measure_sensitivity(
            model, dict.fromkeys(tasks, batches), apart.groups, apart.scores
        )
        assert torch.allclose(
            apart.sensitivity[index], alone[index], rtol=1e-3, atol=1e-7
        ) and torch.equal(*alone)
    assert not torch.allclose(*apart.sensitivity, rtol=0.1)
    all_rows = WandaSP()(model, [*tasks["utility"], *tasks["robustness"]])
    assert all(torch.allclose(apart.scores[n], s) for n, s in all_rows.items())
    said, plain = [], tasks["utility"]
    for calibration in (tasks, plain, dict.fromkeys(tasks, plain), tasks):
        found = plan(model, tmp_path, said, calibration)[1]
    assert torch.equal(found.sensitivity, apart.sensitivity) and len(list(tmp_path.iterdir())) == 2
    assert (
        sum("as measured before" in line for line in said) == 2
    )  # batches for both tasks are a plain calibration


def test_the_built_in_calibration_is_by_task_and_as_long_as_wanted(tmp_path):
    model, processor = testbed.load()
    planner = HiPPPlanner(Preference(1, 0, 0), pruning_ratio=0.5, cache=tmp_path)
    useful = planner.plan(model, processor=processor, rows=6)
    assert (
        planner.signals.calibration
        == Calibration.from_batches(testbed.calibration_tasks(processor, n=6)).digest
    )
    assert useful != planner.plan(model, preference=Preference(0, 1, 0))
    hipp(
        "plan",
        "testbed",
        "--calibration-rows",
        "6",
        "-u",
        "1",
        "--pruning-ratio",
        "0.5",
        "--cache",
        tmp_path,
        "--out",
        tmp_path / "plan.json",
    )
    assert (
        len(list(tmp_path.glob("signals-*"))) == 1
        and PruningPlan.load(tmp_path / "plan.json").groups == useful.groups
    )


@pytest.mark.parametrize(
    "calibration", [{"utility": BATCHES}, {"utility": BATCHES, "robustness": []}]
)
def test_a_calibration_by_task_has_batches_for_both(calibration):
    with pytest.raises(CalibrationError, match="utility and robustness|no batches"):
        measure_signals(build("llava"), calibration)


def test_a_scorer_of_ones_own_is_not_cached(tmp_path):
    class Own(Magnitude):
        """Its name does not tell what it does."""

    plan(build("llava"), tmp_path, [], scorer=Own())
    assert not list(tmp_path.iterdir())
    assert says_all(MRS(form="grad")) and says_all(ExpertUse(others=Magnitude()))
    assert not says_all(MRS(attack=lambda model, batch: batch))
    assert not says_all(ExpertUse(others=Own()))


def test_signals_of_each_scorer_are_cached_apart(tmp_path):
    plans = [plan(build("llava"), tmp_path, [], scorer=s)[0] for s in (None, Magnitude())]
    said = []
    again = [plan(build("llava"), tmp_path, said, scorer=s)[0] for s in (WandaSP(), Magnitude())]
    assert again == plans and plans[0].scorer != plans[1].scorer
    assert len(said) == 2 and all("as measured before" in line for line in said)


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


def header_of(signals):
    return SignalsHeader(**{name: getattr(signals, name) for name in SignalsHeader.model_fields})


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_flipped_bit_costs_only_the_measurement(tmp_path):
    """Wherever it is: in the header's numbers and names, in the scores, in the digest itself."""
    model, said = build("llava"), []
    before, measured = plan(model, tmp_path, [])
    (path,) = tmp_path.iterdir()
    content, rng, used = path.read_bytes(), random.Random(0), 0
    header = int.from_bytes(content[:8], "little")
    for n in range(300):
        path.write_bytes(
            flipped(content, rng.randrange(8 * (8 + header) if n % 2 else 8 * len(content)))
        )
        try:
            found = read_signals(path)
        except (CheckpointError, ValidationError, KeyError, TypeError):
            continue
        used += 1  # a name of the file's padding, say
        assert found.groups == measured.groups and torch.equal(found.state, measured.state)
    assert used < 30
    path.write_bytes(flipped(content, 8 * len(content) - 40))
    assert (
        plan(model, tmp_path, said)[0] == before
        and "is damaged (CheckpointError): measuring again" in said[0]
    )


def test_a_file_under_the_name_of_another_is_measured_again(tmp_path):
    plan(build("llava"), tmp_path / "one", [])
    other = build("llava", seed=1)
    before, _ = plan(other, tmp_path / "two", [])
    (one,), (two,) = ((tmp_path / n).iterdir() for n in ("one", "two"))
    two.write_bytes(one.read_bytes())
    said = []
    assert plan(other, tmp_path / "two", said)[0] == before and "is damaged" in said[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sensitivity": torch.full((2, 6, 9), torch.nan)}, "sensitivity is no signal"),
        ({"sensitivity": torch.full((2, 6, 9), -1.0)}, "sensitivity is below zero"),
        ({"sensitivity": torch.ones(2, 6, 6)}, "sensitivity is no signal"),
        ({"columns.visual": torch.ones(6, dtype=torch.float64)}, "visual is no signal"),
        ({"scores.language.1.ffn": torch.ones(43)}, r"scores\.language\.1\.ffn is no signal"),
    ],
)
def test_signals_that_cannot_have_been_measured_are_refused(signals, change, message):
    """Also with a digest that is right: an attacker who can write the file can make one."""
    with pytest.raises(CheckpointError, match=message):
        header_of(signals).build(signal_tensors(signals) | change)
    groups = header_of(signals).model_dump(mode="json")["groups"]
    for wrong in ({"width": 10**12}, {"layer": 1}, {"unit_parameters": 2**62}, {"width": 0}):
        header = header_of(signals).model_dump(mode="json") | {
            "groups": [groups[0] | wrong, *groups[1:]]
        }
        with pytest.raises(
            ValidationError,
            match=r"no group of a model|two of a name|so many parameters|are no units",
        ):
            SignalsHeader.model_validate(header)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    said = []
    plan(build("llava"), tmp_path / "file", said)
    assert "signals are not kept" in said[-1]


def test_module_robustness_sensitivity_is_a_signal(tmp_path):
    model, said = build("llava"), []
    mrs = MRS(form="grad", attack_steps=2)
    _, measured = plan(model, tmp_path, said, mrs=mrs)
    assert any("under attack" in line for line in said)
    expected = mrs.sensitivity(model, BATCHES)
    assert measured.columns["mrs"].tolist() == pytest.approx(
        [expected[g.name] for g in measured.groups]
    )
    assert measured.state.shape == (len(measured.groups), FEATURES + 1)
    logs = measured.columns["mrs"].log()
    assert measured.state[:, -1].tolist() == pytest.approx(
        ((logs - logs.mean()) / logs.std(unbiased=False)).tolist(), abs=1e-3
    )
    _, plain = plan(model, tmp_path, [])
    assert "mrs" not in plain.columns and torch.equal(plain.state, measured.state[:, :-1])
    said.clear()
    assert torch.equal(plan(model, tmp_path, said, mrs=mrs)[1].state, measured.state)
    assert len(said) == 1 and "as measured before" in said[0]


def test_a_planner_with_mrs_is_saved_and_loaded(tmp_path):
    model = build("llava")
    planner = HiPPPlanner(Preference(1, 1, 1), mrs=MRS())
    before = planner.plan(model, calibration=BATCHES)
    planner.save(tmp_path / "planner")
    loaded = HiPPPlanner.load(tmp_path / "planner")
    assert loaded.mrs.name == "MRS" and loaded.plan(model) == before
    with pytest.raises(PlanError, match="features of a group"):
        HiPPPlanner(Preference(1, 1, 1), policy=loaded.policy)


def test_memory_stays_within_the_activations_of_one_pass():
    """On top of the weights: half as much again as a pass whose activations are kept for gradients,
    with its logits.
    """
    batches = noise(4, at_once=1)
    model = random_llava(256, 2, whole=True)
    with training_only(model, [model.get_input_embeddings().weight]), LiveBytes() as one_pass:
        forward(model, batches[0]).logits.logsumexp(-1)
    with LiveBytes() as measuring:
        measure_signals(model, batches)
    assert measuring.peak < 1.5 * one_pass.peak


def test_the_probe_of_visual_sensitivity_keeps_no_layer_that_is_through():
    model, batches = random_llava(256, 6), noise(2, at_once=1)
    with torch.no_grad(), LiveBytes() as plain:
        forward_hidden(model, batches[0])
    with LiveBytes() as looking:
        VisualSensitivity()(model, batches)
    one_layer = batches[0]["input_ids"].numel() * model.get_input_embeddings().weight[0].nbytes
    assert looking.peak < plain.peak + 2 * one_layer
