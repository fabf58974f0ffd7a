"""What compression counts."""

import pytest
import torch
from models import build

from hipp_ext import prune
from hipp_ext.errors import BudgetError
from hipp_ext.groups import find_groups
from hipp_ext.planner.cost import compression, cost_of
from hipp_ext.units import plan_from_counts

MODEL = build("llava_gqa")
GROUPS = find_groups(MODEL)
COUNTS = tuple(max(1, g.width // (2 + i % 2)) for i, g in enumerate(GROUPS))


def removed(kind, counts=COUNTS, **options):
    return float(compression(cost_of(GROUPS, kind, **options), GROUPS, [counts])[0])


def test_parameters_are_those_that_pruning_removes():
    plan = plan_from_counts(GROUPS, COUNTS, {g.name: torch.arange(g.width).float() for g in GROUPS})
    gone = sum(p.numel() for p in MODEL.parameters()) - sum(
        p.numel() for p in prune(MODEL, plan).parameters()
    )
    assert (
        removed("parameters")
        == pytest.approx(plan.pruning_ratio)
        == pytest.approx(gone / sum(g.parameters for g in GROUPS))
    )


def test_flops_are_those_that_torch_counts():
    """The linear layers of the language tower, with nothing in context."""
    from torch.utils.flop_counter import FlopCounterMode

    plan = plan_from_counts(GROUPS, COUNTS, {g.name: torch.arange(g.width).float() for g in GROUPS})

    def flops(model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            for g in GROUPS:
                for name in (*g.producers, g.consumer):
                    layer = model.get_submodule(name)
                    layer(torch.zeros(1, layer.in_features))
        return counter.get_total_flops()

    assert removed("flops", tokens=0) == pytest.approx(1 - flops(prune(MODEL, plan)) / flops(MODEL))
    heads = tuple(1 if g.kind == "attention" else g.width for g in GROUPS)
    assert removed("flops", heads, tokens=4000) > removed("flops", heads, tokens=0)


def test_an_unknown_kind_is_refused():
    with pytest.raises(BudgetError, match="one of parameters, flops is needed"):
        cost_of(GROUPS, "watts")  # type: ignore[arg-type]
