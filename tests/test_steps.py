"""What a measurement has finished survives kill -9, and no other measurement uses it."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from models import batch, build

from hipp_ext import HiPPPlanner, Preference
from hipp_ext.allocators import Sensitivity
from hipp_ext.calibration import Calibration
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import seal
from hipp_ext.fingerprint import weights_digest
from hipp_ext.groups import find_groups
from hipp_ext.runs import RunFolder
from hipp_ext.scorers import FLAP, WandaSP
from hipp_ext.sensitivity.cached import measured_on
from hipp_ext.steps import Steps, identity_key

BATCHES = [batch("llama", size=2, seed=seed, labels=True) for seed in range(3)]
SHAPES = {"x": (2, 3)}
TENSORS = {"x": torch.arange(6.0).view(2, 3)}


@pytest.fixture(autouse=True)
def no_delay(monkeypatch):
    monkeypatch.setattr("hipp_ext.steps.EVERY", 0.0)


@pytest.fixture
def kept(monkeypatch):
    """The names of the steps that were carried out, with the number of points."""
    names, keep = [], Steps.keep

    def noted(self, name, tensors):
        names.append((name, len(tensors["kl"])) if "kl" in tensors else name)
        keep(self, name, tensors)

    monkeypatch.setattr(Steps, "keep", noted)
    return names


def by_planner(folder, **options):
    planner = HiPPPlanner(Preference(1, 1, 1), pruning_ratio=0.3, cache=folder)
    return planner.plan(build("llama"), calibration=BATCHES, **options)


def by_allocator(folder, **options):
    allocator = Sensitivity(pruning_ratio=0.3, effort="measured", cache=folder)
    return allocator.plan(build("llama"), calibration=BATCHES, **options)


def killed(plan, folder: Path, step: str, points: int = 0) -> None:
    """Plan in a process that gets SIGKILL as soon as a step is kept."""
    keep = Steps.keep

    def die(self, name, tensors):
        keep(self, name, tensors)
        if name == step and len(tensors.get("kl", ())) >= points:
            os.kill(os.getpid(), signal.SIGKILL)

    def run():
        torch.set_num_threads(1)
        Steps.keep = die
        plan(folder)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_the_planner_goes_on_after_kill_9(tmp_path, kept):
    killed(by_planner, tmp_path, "points-0-1", 2)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("measuring-") and (left / "fisher-3.safetensors").exists()
    said = []
    plan = by_planner(tmp_path, log=said.append)
    assert any("resuming an interrupted measurement" in line for line in said)
    points = len(find_groups(build("llama")))
    assert kept[: points - 2] == [("points-0-1", n) for n in range(3, points + 1)]
    assert {name for name, _ in kept} == {"points-0-1", "points-0-2", "points-1-0"}
    (signals,) = tmp_path.iterdir()  # nothing else is left
    assert signals.name.startswith("signals-")
    assert plan == by_planner(None)


def test_an_allocator_goes_on_after_kill_9_and_then_knows(tmp_path, kept):
    killed(by_allocator, tmp_path, "fisher-2")
    announced = []
    plan = by_allocator(tmp_path, announce=lambda given, passes: announced.append(passes))
    assert kept[0] == "fisher-3" and ("points-0-0", 1) in kept
    kept.clear()
    again = by_allocator(tmp_path, announce=lambda given, passes: announced.append(passes))
    assert not kept and plan == again == by_allocator(None)
    assert announced[0] > 20 and announced[1] == 1  # the scores
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    assert by_allocator(tmp_path) == plan and kept


def test_another_measurement_is_another_folder():
    """All that results depend on is part of the name."""

    def key(model=None, groups=None, batches=BATCHES, **settings):
        model = model or build("llama")
        given = Calibration.from_batches(batches)
        settings = {"effort": "anchored", "scorer": WandaSP().name} | settings
        return identity_key(measured_on(model, groups or find_groups(model), given, **settings))

    other_weight, other_bias = build("llama"), build("llama")
    with torch.no_grad():
        other_weight.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-4
        other_bias.model.norm.weight[[0, 1]] = torch.tensor([1.5, 0.5])
    swapped = build("llama")
    swapped.model.norm.weight.data[[0, 1]] = torch.tensor([0.5, 1.5])
    other_config = build("llama")
    other_config.config.rms_norm_eps *= 2
    keys = [
        key(),
        key(other_weight),
        key(other_bias),
        key(swapped),
        key(other_config),
        key(build("llama").double()),
        key(groups=find_groups(build("llama"), attention_unit="query")),
        key(batches=BATCHES[:2]),
        key(batches=[{**b, "labels": b["labels"].roll(1, 1)} for b in BATCHES]),
        key(effort="measured"),
        key(scorer=FLAP().name),
    ]
    assert len(set(keys)) == len(keys) and key() == keys[0]
    moved = build("llama")
    moved.config._name_or_path = "/elsewhere"
    assert key(moved) == keys[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_every_type_of_weights_has_a_digest(dtype):
    layer = torch.nn.Linear(4, 3).to(dtype)
    before = weights_digest(layer)
    layer.weight.data[1, 2] = layer.weight.data[1, 2].float().add(1).to(dtype)
    assert weights_digest(layer) != before


def test_a_step_is_carried_out_once_until_all_succeed(tmp_path):
    made = []

    def make():
        made.append(1)
        return TENSORS

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), Steps(tmp_path, {"a": 1}) as steps:
            assert torch.equal(steps.step("one", SHAPES, make)["x"], TENSORS["x"])
            raise KeyboardInterrupt
    assert len(made) == 1
    with Steps(tmp_path, {"a": 2}) as steps:
        steps.step("one", SHAPES, make)
    with Steps(tmp_path, {"a": 1}) as steps:
        steps.step("one", {"x": (2, 4)}, make)  # of another shape
        assert len(made) == 3
    assert not list(tmp_path.iterdir())


def test_what_is_quick_is_written_only_when_it_is_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr("hipp_ext.steps.EVERY", 1000.0)
    with pytest.raises(ValueError), Steps(tmp_path, {}) as steps:
        steps.keep("one", TENSORS)
        assert not list(tmp_path.iterdir())
        raise ValueError
    with Steps(tmp_path, {}) as steps:
        assert torch.equal(steps.known("one")["x"], TENSORS["x"])


def test_damaged_steps_are_carried_out_again(tmp_path):
    with pytest.raises(ValueError), Steps(tmp_path, {}) as steps:
        steps.keep("one", TENSORS)
        steps.keep("two", TENSORS)
        raise ValueError
    (folder,) = tmp_path.iterdir()
    (folder / "one.safetensors").write_bytes(b"nothing like it")
    with pytest.raises(ValueError), Steps(tmp_path, {}) as steps:
        assert steps.known("one") == {} and steps.known("two")
        raise ValueError
    write_atomic(folder / "run.json", "{}")
    with Steps(tmp_path, {}) as steps:
        assert steps.known("two") == {}


def test_one_of_several_processes_keeps_what_all_may_read(tmp_path):
    folder = tmp_path / f"measuring-{identity_key({})}"
    with RunFolder(folder, {}), Steps(tmp_path, {}) as steps:  # another process has the folder
        steps.keep("one", TENSORS)
        assert steps.known("one") == {}
        write_atomic(folder / "one.safetensors", seal(TENSORS))
        assert torch.equal(steps.known("one")["x"], TENSORS["x"])
    with Steps(tmp_path, {}) as steps:
        assert steps.known("one")
    assert not folder.exists()
    with Steps(tmp_path, {}) as steps, RunFolder(folder, {}):  # since before the first step
        steps.keep("two", TENSORS)
        assert {p.name for p in folder.iterdir()} == {"run.json"}


def test_where_nothing_can_be_kept_the_measurement_goes_on(tmp_path):
    said: list[str] = []
    (tmp_path / "file").touch()
    with Steps(tmp_path / "file", {}, said.append) as steps:
        steps.keep("one", TENSORS)
        steps.keep("two", TENSORS)
    assert len(said) == 1 and "an interruption would lose" in said[0]
