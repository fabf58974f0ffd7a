"""Plans of each shape that a pruned model may have."""

from collections.abc import Callable
from typing import Any

from plans import dropping_plan, random_plan, random_scores

from hipp_ext import PruningPlan
from hipp_ext.groups import find_groups
from hipp_ext.units import plan_from_counts


def free(model: Any) -> PruningPlan:
    """Widths that differ from layer to layer."""
    return random_plan(model, 0.4)


def uniform(model: Any) -> PruningPlan:
    """One width for all layers."""
    groups = find_groups(model)
    return plan_from_counts(groups, [g.width // 2 for g in groups], random_scores(groups))


def query_heads(model: Any) -> PruningPlan:
    """Fewer query heads in all layers but the first, all keys and values."""
    groups = find_groups(model, attention_unit="query")
    counts = [g.width - (g.layer > 0) * g.sections for g in groups]
    return plan_from_counts(groups, counts, random_scores(groups))


def layers(model: Any) -> PruningPlan:
    """One layer less."""
    return dropping_plan(model, "language.1.attention", "language.1.ffn")


def blocks(model: Any) -> PruningPlan:
    """Layers without attention, the first one among them, and without FFN, in a model whose other
    layers have different widths."""
    gone = ("language.0.attention", "language.1.ffn", "language.2.attention")
    return dropping_plan(model, *gone, half=("language.0.ffn", "language.1.attention"))


SHAPES: dict[str, Callable[[Any], PruningPlan]] = {
    "free": free,
    "uniform": uniform,
    "query heads": query_heads,
    "layers": layers,
    "blocks": blocks,
}
