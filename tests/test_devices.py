"""Models that lie on several devices (device_map) are scored, planned for and pruned as on one; offloaded ones are refused."""

import pytest
import torch
from devices import FIRST, SECOND, pretended_devices, spread
from models import BUILDERS, batch, build

from hipp_ext import HiPPPlanner, Preference, masked, prune, scorers
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups import find_groups, tower_layers
from hipp_ext.masks import plan_from_counts
from hipp_ext.planner.state import measure_signals

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


def on_two_devices(name):
    model = build(name)
    return spread(model, tower_layers(model, "language"))


@torch.no_grad()
def answers_when_pruned(model, plan, batches):
    with masked(model, plan):
        hidden = model(**batches[0]).logits
    small, compensated = prune(model, plan), prune(model, plan, compensate=True, calibration=batches)
    return [hidden, small(**batches[0]).logits, compensated(**batches[0]).logits]


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_a_spread_model_is_measured_and_pruned_as_a_whole_one(name):
    model, batches = build(name), [batch(name), batch(name, seed=1)]
    groups = find_groups(model)
    expected = measure_signals(model, batches)
    plan = plan_from_counts(groups, [max(1, g.width // 2) for g in groups], expected.scores)
    outcomes = [answers_when_pruned(model, plan, batches)]
    with pretended_devices():
        model = on_two_devices(name)
        assert {p.device for p in model.parameters()} == {torch.device(FIRST), torch.device(SECOND)}
        signals = measure_signals(model, batches)
        outcomes.append([logits.cpu() for logits in answers_when_pruned(model, plan, batches)])
    assert torch.allclose(signals.sensitivity, expected.sensitivity, rtol=1e-3, atol=1e-6) and expected.sensitivity.max() > 1e-4
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
        assert torch.allclose(scores[name], values, rtol=1e-2, atol=1e-6 * float(values.abs().max())), name


def test_offloaded_weights_are_named():
    from accelerate import cpu_offload

    model, batches = cpu_offload(build("llava"), torch.device("cpu")), [batch("llava", labels=True)]
    for scorer in SCORERS:
        with pytest.raises(UnsupportedModelError, match=r"q_proj has no weights here \(offloaded.*several GPUs may share it"):
            scorer()(model, batches)
    with pytest.raises(UnsupportedModelError, match="has no weights here"):
        HiPPPlanner(Preference(1, 1, 1)).plan(model, calibration=batches)
