"""Models that lie on several devices (device_map) are scored, planned for and pruned as on one;
offloaded ones are refused.
"""

import gc
import sys
import weakref

import accelerate
import pytest
import torch
from devices import FIRST, SECOND, later_half, pretended_devices, spread
from models import VARIED, batch, build

from hipp_ext import HiPPPlanner, Preference, load_pruned, masked, prune, save_pruned, scorers
from hipp_ext.answers import AnswerLogits
from hipp_ext.cli.console import load_model
from hipp_ext.errors import CheckpointError, HippError, UnsupportedModelError
from hipp_ext.groups import find_groups
from hipp_ext.planner.state import measure_signals
from hipp_ext.units import plan_from_counts

NAMES = ("FLAP", "MRS", "Magnitude", "SynFlow", "Taylor", "VisualSensitivity", "WandaSP")
SCORERS = [getattr(scorers, name) for name in NAMES]


def test_pretended_devices_do_not_mix_and_compute_as_the_cpu_does():
    weight = torch.nn.Parameter(torch.randn(3, 4))
    x = torch.randn(2, 4)
    with pretended_devices():
        there = torch.nn.Parameter(weight.detach().to(SECOND))
        assert there.device == torch.device(SECOND) and type(there) is torch.nn.Parameter
        with pytest.raises(RuntimeError, match=r"xla:0.*xla:1"):
            torch.nn.functional.linear(x.to(FIRST), there)
        with pytest.raises(RuntimeError, match=r"aten::index of tensors on"):
            there[torch.tensor([0]).to(FIRST)]
        assert there[torch.tensor([1])].tolist() == weight[1:2].tolist()
        torch.nn.functional.linear(x.to(SECOND), there).square().sum().backward()
        assert there.grad.device == torch.device(SECOND)
        gradient = there.grad.cpu()
    torch.nn.functional.linear(x, weight).square().sum().backward()
    assert torch.equal(gradient, weight.grad)


def on_two_devices(name, part="layers"):
    model = build(name)
    return spread(model, later_half(model) if part == "layers" else {model.model.vision_tower})


@torch.no_grad()
def answers_when_pruned(model, plan, batches):
    with masked(model, plan):
        hidden = model(**batches[0]).logits
    small, reconstructed = (
        prune(model, plan),
        prune(model, plan, reconstruct=True, calibration=batches),
    )
    return [hidden, small(**batches[0]).logits, reconstructed(**batches[0]).logits]


@pytest.mark.parametrize(
    ("name", "part"), [*((name, "layers") for name in VARIED), ("llava", "vision")]
)
def test_a_spread_model_is_measured_and_pruned_as_a_whole_one(name, part):
    model, batches = build(name), [batch(name), batch(name, seed=1)]
    groups = find_groups(model)
    expected = measure_signals(model, batches)
    plan = plan_from_counts(groups, [max(1, g.width // 2) for g in groups], expected.scores)
    outcomes = [answers_when_pruned(model, plan, batches)]
    with pretended_devices():
        model = on_two_devices(name, part)
        assert {p.device for p in model.parameters()} == {torch.device(FIRST), torch.device(SECOND)}
        signals = measure_signals(model, batches)
        outcomes.append([logits.cpu() for logits in answers_when_pruned(model, plan, batches)])
    assert (
        torch.allclose(signals.sensitivity, expected.sensitivity, rtol=1e-3, atol=1e-6)
        and expected.sensitivity.max() > 1e-4
    )
    assert torch.allclose(signals.state, expected.state, atol=1e-3)
    for whole, spread_out in zip(*outcomes, strict=True):
        assert torch.allclose(whole, spread_out, atol=1e-4)


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda s: s.__name__)
def test_every_scorer_takes_a_spread_model(scorer):
    batches = [batch("llava", labels=True, seed=s) for s in range(2)]
    expected = scorer()(build("llava"), batches)
    with pretended_devices():
        scores = scorer()(on_two_devices("llava"), batches)
    for name, values in expected.items():
        assert torch.allclose(
            scores[name], values, rtol=1e-2, atol=1e-6 * float(values.abs().max())
        ), name


@pytest.mark.parametrize("part", ["model.vision_tower", "model.language_model.layers.1"])
def test_offloaded_weights_are_named(part):
    model, batches = build("llava"), [batch("llava", labels=True)]
    plan = plan_from_counts(
        find_groups(model), [g.width - 1 for g in find_groups(model)], scorers.Magnitude()(model)
    )
    accelerate.cpu_offload(model.get_submodule(part), torch.device("cpu"))
    refused = [lambda s=scorer: s()(model, batches) for scorer in SCORERS]
    refused += [
        lambda: AnswerLogits(model, batches),
        lambda: HiPPPlanner(Preference(1, 1, 1)).plan(model, calibration=batches),
    ]
    if "language" in part:
        refused += [lambda: prune(model, plan), lambda: masked(model, plan).__enter__()]
    for attempt in refused:
        with pytest.raises(
            UnsupportedModelError,
            match=rf"^{part}.* is not in memory \(offloaded.*several GPUs may share it",
        ):
            attempt()


def test_a_pruned_copy_of_a_spread_model_is_its_own(tmp_path):
    """accelerate binds `to` and `cuda` to the instance that it spreads."""
    model = accelerate.dispatch_model(
        build("llava"), {"": "cpu"}, force_hooks=True, skip_keys="past_key_values"
    )
    assert "to" in model.__dict__
    plan = plan_from_counts(
        find_groups(model), [g.width // 2 for g in find_groups(model)], scorers.Magnitude()(model)
    )
    small = prune(model, plan)
    save_pruned(small, tmp_path / "small")
    assert torch.equal(
        load_pruned(tmp_path / "small")(**batch("llava")).logits, small(**batch("llava")).logits
    )
    assert small.to(torch.bfloat16) is small and {p.dtype for p in model.parameters()} == {
        torch.float32
    }
    dense = weakref.ref(model)
    del model
    gc.collect()
    assert dense() is None, "the pruned copy keeps the dense model in memory"


def test_the_command_line_spreads_where_it_can(monkeypatch):
    model, _ = load_model("testbed", "auto", spread=True)
    assert model.device.type in ("cpu", "cuda")
    with pytest.raises(CheckpointError, match="device 'auto' cannot be used here"):
        load_model("testbed", "auto")
    with (
        monkeypatch.context() as patch,
        pytest.raises(HippError, match="Under torchrun every process needs a GPU of its own"),
    ):
        patch.setenv("WORLD_SIZE", "2")
        load_model("testbed", "auto", spread=True)
    with monkeypatch.context() as patch, pytest.raises(HippError, match="pip install accelerate"):
        patch.setitem(sys.modules, "accelerate", None)
        load_model("testbed", "auto", spread=True)
