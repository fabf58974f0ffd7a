"""Plans for torch-pruning's own pruner: its arguments, or the reason why it cannot be used."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from hipp_ext.errors import PlanError, UnsupportedModelError
from hipp_ext.groups import Group, block_of, check_sliceable, find_groups, query_groups, sync_sizes
from hipp_ext.integrations.torch_pruning_importance import HippImportance, linear
from hipp_ext.kinds import shares_keys
from hipp_ext.plan import PruningPlan
from hipp_ext.surgery.compose import plan_in_total
from hipp_ext.surgery.layer_config import write_layer_config
from hipp_ext.surgery.masks import PLAN_ATTRIBUTE, match
from hipp_ext.units import keep_masks


def to_tp_kwargs(plan: PruningPlan, model: nn.Module) -> dict[str, Any]:
    """Keyword arguments with which the stock pruner removes exactly the units that `plan` removes.

    `tp.pruner.BasePruner(model, example_inputs, **arguments).step()`, `example_inputs` a mapping of
    the forward's tensors. The importance among them scores 1 for a unit that stays and 0 for one
    that goes; with another one in its place the plan's keep counts are still met. Afterwards
    `confirm(model, plan)` checks this, and prepares the model for `save_pruned`. The
    stock pruner leaves the model in eval mode.

    Raises:
        PlanError: the plan does not fit the model.
        UnsupportedModelError: the stock pruner would hang, or leave the plan undone without saying
            so; the message says which group and why. PlanPruner carries the same plan out.
    """
    groups = match(model, plan)
    pairs = [(g, e) for g, e in zip(groups, plan.groups, strict=True) if e.keep < e.width]
    check_sliceable(model, [g for g, _ in pairs])
    for group, entry in pairs:
        if reason := _stock_fails(model, group, entry.keep):
            raise UnsupportedModelError(
                f"torch-pruning's stock pruner cannot carry out {group.name}: {reason} Use "
                "PlanPruner."
            )
    masks = keep_masks(plan)
    producers = {linear(model, n) for g, _ in pairs for n in g.producers}
    heads = {
        linear(model, n): g.width for g, _ in pairs if g.kind == "attention" for n in g.producers
    }
    layers = [
        m
        for m in model.modules()
        if isinstance(m, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd)
    ]
    norms = [p for g, _ in pairs if g.kind == "attention" for p in _head_norms(model, g)]
    # Half a unit less than the plan removes: the stock pruner keeps int(C * (1 - ratio)), and a
    # rounding error would remove one unit more.
    ratios = {
        linear(model, n): (e.width - e.keep - 0.5) / e.width for g, e in pairs for n in g.producers
    }
    return {
        "importance": HippImportance(
            {g.name: masks[g.name].float() for g, _ in pairs}, model=model
        ),
        "pruning_ratio": 0.0,
        # It reads head ratios only where a head's width has a ratio too, which it then ignores.
        "pruning_ratio_dict": {m: 0.5 if m in heads else ratio for m, ratio in ratios.items()},
        "head_pruning_ratio_dict": {m: ratio for m, ratio in ratios.items() if m in heads},
        "num_heads": heads,
        "prune_num_heads": True,
        "prune_head_dims": False,
        "ignored_layers": [m for m in layers if m not in producers] + norms,
        "forward_fn": _logits_without_cache,
        # Its defaults are dictionaries that all pruners of a process share.
        "in_channel_groups": {},
        "out_channel_groups": {},
    }


def _stock_fails(model: nn.Module, group: Group, keep: int) -> str | None:
    """Why the stock pruner cannot prune `group`; None where it can."""
    if not keep:
        return "it drops no block whole."
    if group.tower == "vision":
        return (
            "vision layers whose output is not read are missing from its graph, and it silently "
            "leaves them whole."
        )
    layers = [linear(model, n) for n in (*group.producers, group.consumer)]
    if any(not p.requires_grad for m in layers for p in m.parameters()):
        return (
            "its weights are frozen; the stock pruner traces through gradients, and unfreezes what "
            "it prunes."
        )
    if group.kind == "query_heads":
        return (
            "it does not keep the number of query heads that share a key head, and leaves layers "
            "whole where one of them would be left."
        )
    if len(group.produced) > len(group.producers):
        return "its projections are fused in one layer, which it cuts anywhere."
    if group.kind == "attention" and shares_keys(block_of(model, group)):
        return (
            f"{group.columns // group.produced[1].size} query heads share a key head. The stock "
            "pruner removes query heads only, never a key head with all its query heads, and does "
            "not come back where two share one."
        )
    return None


def _head_norms(model: nn.Module, group: Group) -> list[nn.Parameter]:
    """Parameters of an attention block that all heads share, such as the weights of q_norm."""
    owned = {linear(model, n) for n in (*group.producers, group.consumer)}
    return [
        p
        for m in block_of(model, group).modules()
        if m not in owned
        for p in m.parameters(recurse=False)
    ]


def _logits_without_cache(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    # With a cache, building the groups does not end; and the graph starts at a tensor.
    return model(**{**inputs, "use_cache": False}).logits


def confirm(model: nn.Module, plan: PruningPlan) -> None:
    """Check that another pruner carried `plan` out on `model`, and update its sizes and config.

    Afterwards it is as `hipp_ext.prune` would have left it: `save_pruned` works, and
    `model.hipp_plan` is the plan, composed with that of a model that was pruned before.

    Raises:
        PlanError: a group has another width than planned (the stock pruner may skip groups
            silently).
        UnsupportedModelError: what is left of a group cannot be mapped.
    """
    found = find_groups(model, plan.towers, partial="report")
    groups = {g.name: g for g in (*found, *query_groups(model, plan.towers))}
    wrong = [
        f"{e.name} has {groups[e.name].width if e.name in groups else 'no'} units of "
        f"{groups[e.name].unit_parameters if e.name in groups else 0} parameters, planned {e.keep} "
        f"of {e.unit_parameters}"
        for e in plan.groups
        if e.name not in groups
        or (groups[e.name].width, groups[e.name].unit_parameters) != (e.keep, e.unit_parameters)
    ]
    if wrong or len(found) != len(plan.groups):
        raise PlanError(
            f"The model is not what the plan says: {'; '.join(wrong[:4]) or 'it has other groups'}."
        )
    for entry in plan.groups:
        sync_sizes(model, groups[entry.name], entry.keep)
    write_layer_config(model)
    setattr(model, PLAN_ATTRIBUTE, _in_total(model, plan))


def _in_total(model: nn.Module, plan: PruningPlan) -> PruningPlan:
    """The plan that `model` carries if it has `plan` in it already; else both composed."""
    before: PruningPlan | None = getattr(model, PLAN_ATTRIBUTE, None)
    total = plan_in_total(model, plan)
    if before is None or total is not plan:
        return total
    left, planned = ([e.keep for e in p.groups if e.keep] for p in (before, plan))
    return before if left == planned else plan
