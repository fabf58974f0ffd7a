"""The channels of a CNN as groups, read from torch-pruning's dependency graph.

groups = find_channel_groups(model, pictures[:1])
scores = channel_mrs(model, batches, loss, groups)         # for HippImportance
prune_channels(model, pictures[:1], {"layer1.0.conv1": (0, 3, 5), ...})
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.errors import CalibrationError, PlanError, UnsupportedModelError
from hipp_ext.integrations.torch_pruning_graph import read_groups, traced, undone_on_error
from hipp_ext.integrations.torch_pruning_probe import misrouted
from hipp_ext.modes import call, evaluating
from hipp_ext.scorers.channels import ChannelGroup, require_removable
from hipp_ext.scorers.gates import Loss
from hipp_ext.scorers.mrs import Form, measure, unit_shares

__all__ = ["ChannelGroup", "channel_mrs", "find_channel_groups", "prune_channels"]


def find_channel_groups(
    model: nn.Module,
    example_inputs: Any,
    *,
    ignored: Sequence[nn.Module] = (),
    forward_fn: Callable | None = None,
    outputs: bool = False,
) -> tuple[ChannelGroup, ...]:
    """The groups of channels that can be removed, in the order of the forward pass.

    Args:
        model: traced once in eval mode, and left as it was; frozen weights are traced too.
        example_inputs: one row suffices.
        ignored: layers whose output channels must stay; everything coupled with them stays too.
        forward_fn: (model, example_inputs) -> outputs; None: the inputs are unpacked into the
            model's call.
        outputs: channels that no layer reads, the model's outputs, are groups too: for scores that
            a pruner asks for. They are not removed by `prune_channels`.

    Raises:
        UnsupportedModelError: torch-pruning cannot trace the model or follow its channels, or no
            channels can be removed.
    """
    with traced(model, example_inputs, ignored, forward_fn) as graph:
        found = _routed(graph, example_inputs, read_groups(graph, ignored), forward_fn)
    if errors := [group for group in found if isinstance(group, UnsupportedModelError)]:
        raise errors[0]
    groups = [g for g in found if isinstance(g, ChannelGroup) and (g.consumers or outputs)]
    if not groups:
        raise UnsupportedModelError(
            f"No channels of this {type(model).__name__} can be removed: no conv or linear layer "
            "was found whose outputs "
            "another one reads. Custom attention or recurrent layers are not traced."
        )
    return tuple(groups)


def prune_channels(
    model: nn.Module,
    example_inputs: Any,
    kept: Mapping[str, Sequence[int]],
    *,
    forward_fn: Callable | None = None,
) -> None:
    """Remove channels in place, and everything that depends on them.

    On an error the model is restored to the bit.

    Args:
        model: weights that stay keep their values to the bit.
        example_inputs: one row; the pruned model runs on it once.
        kept: group name -> indices of the channels that stay, as `find_channel_groups` names them;
            other groups stay whole.
        forward_fn: as for `find_channel_groups`.

    Raises:
        PlanError: a name is no group, an index is out of range or repeated, a group would lose
            all channels, or a grouped convolution would be left with groups of different sizes.
        UnsupportedModelError: the model cannot be traced, torch-pruning cannot carry this out, or
            the model would not run.
    """
    with undone_on_error(model):
        with traced(model, example_inputs, forward_fn=forward_fn) as graph:
            groups = _chosen(
                model, _routed(graph, example_inputs, read_groups(graph), forward_fn), kept
            )
            _check_grouped(model, groups, kept)
            _check_norms(graph, groups, kept)
            sizes = _sizes_after(model, groups, kept)
            for group in groups:
                _remove(graph, group, kept[group.name])
        for name, size in sizes.items():
            if tuple(_tensors(model)[name].shape) != size:
                raise UnsupportedModelError(
                    f"torch-pruning made {name} {tuple(_tensors(model)[name].shape)} where {size} "
                    "was to stay. The model is as "
                    "it was; list the layers that this one is coupled with in ignored."
                )
        try:
            with evaluating(model), torch.no_grad():
                (forward_fn or call)(model, example_inputs)
        except Exception as error:
            raise UnsupportedModelError(
                f"This {type(model).__name__} ran before its channels were removed and does not "
                f"now ({error}): its forward "
                "takes sizes from elsewhere than its layers. The model is as it was; list those in "
                "question of "
                f"{', '.join(g.name for g in groups)} in ignored."
            ) from error


def _routed(
    graph: Any,
    example_inputs: Any,
    found: Sequence[ChannelGroup | UnsupportedModelError],
    forward_fn: Callable | None,
) -> list[ChannelGroup | UnsupportedModelError]:
    """`found`, with an error in the place of every group that torch-pruning misroutes."""
    groups = [g for g in found if isinstance(g, ChannelGroup) and g.consumers]
    errors = misrouted(
        graph.model, lambda: (forward_fn or call)(graph.model, example_inputs), groups
    )
    return [errors.get(g.name, g) if isinstance(g, ChannelGroup) else g for g in found]


def _chosen(
    model: nn.Module,
    found: Sequence[ChannelGroup | UnsupportedModelError],
    kept: Mapping[str, Sequence[int]],
) -> list[ChannelGroup]:
    """The groups that lose channels."""
    groups = {g.name: g for g in found if isinstance(g, ChannelGroup) and g.consumers}
    unknown = [g for g in found if isinstance(g, UnsupportedModelError)]
    for name, channels in kept.items():
        if name not in groups:
            if unknown:
                raise unknown[0]
            raise PlanError(
                f"{name!r} is not a channel group of this {type(model).__name__}; its groups are "
                f"{list(groups)[:8]}, ..."
            )
        known = set(range(groups[name].width))
        if not channels or len(set(channels)) < len(channels) or not set(channels) <= known:
            raise PlanError(
                f"{name} has channels 0 to {groups[name].width - 1}, of which one at least must "
                "stay; got "
                f"{list(channels)[:12]}."
            )
    chosen = [groups[n] for n, channels in kept.items() if len(channels) < groups[n].width]
    require_removable(chosen)
    return chosen


def _check_grouped(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]
) -> None:
    """Raise PlanError unless the groups of every grouped convolution stay alike.

    Each must keep the same number of outputs and the same inputs.
    """
    grouped: Any = [(name, m) for name, m in model.named_modules() if _is_grouped(m)]
    for name, layer in grouped:
        for produced, size in ((True, layer.out_channels), (False, layer.in_channels)):
            stays = torch.ones(size, dtype=torch.bool)
            for group in groups:
                if (units := group.units_of(name, produced)) is not None:
                    stays &= (units < 0) | torch.isin(units, torch.tensor(list(kept[group.name])))
            rows = stays.view(layer.groups, -1)
            if len(set(rows.sum(1).tolist())) > 1 or (
                not produced and not bool((rows == rows[0]).all())
            ):
                raise PlanError(
                    f"{name} has {layer.groups} groups of {rows.shape[1]} "
                    f"{'output' if produced else 'input'} channels; "
                    f"{'as many' if produced else 'the same ones'} must stay in each, not "
                    f"{stays.nonzero()[:, 0].tolist()[:16]}. Nothing was changed."
                )


def _is_grouped(layer: nn.Module) -> bool:
    """Whether it is a convolution of several groups, and not depthwise."""
    conv = isinstance(layer, nn.modules.conv._ConvNd)
    return conv and layer.groups not in (1, layer.in_channels)


def _check_norms(
    graph: Any, groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]
) -> None:
    """Raise PlanError unless every group norm keeps the same number of channels per group.

    Otherwise other channels would be normalised together, silently if their number is divisible.
    """
    stays: dict[str, Tensor] = {}
    for group in groups:
        for item in _doomed(graph, group, kept[group.name]):
            layer = item.dep.target.module
            if isinstance(layer, nn.GroupNorm) and layer.num_groups > 1:
                name = graph._module2name[layer]
                stays.setdefault(name, torch.ones(layer.num_channels, dtype=torch.bool))[
                    [int(i) for i in item.idxs]
                ] = False
    for name, channels in stays.items():
        rows = channels.view(graph.model.get_submodule(name).num_groups, -1)
        if len(set(rows.sum(1).tolist())) > 1 or not rows.any():
            raise PlanError(
                f"{name} is a group norm of {len(rows)} groups of {rows.shape[1]} channels; as "
                "many must stay in each, not "
                f"{channels.nonzero()[:, 0].tolist()[:16]}. Nothing was changed."
            )


def _sizes_after(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """Name of every parameter and buffer -> its shape when the channels have gone."""
    sizes = {name: list(t.shape) for name, t in _tensors(model).items()}
    for group in groups:
        gone = torch.ones(group.width, dtype=torch.bool)
        gone[list(kept[group.name])] = False
        for part in group.slices:
            sizes[part.parameter][part.dim] -= int(part.sizes[gone].sum())
        for consumer in group.consumers:
            layer: Any = model.get_submodule(consumer.layer)
            if _is_grouped(layer):
                read = int(gone[consumer.units[consumer.units >= 0]].sum())
                sizes[f"{consumer.layer}.weight"][1] -= read // layer.groups
    return {name: tuple(size) for name, size in sizes.items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )


def _doomed(graph: Any, group: ChannelGroup, kept: Sequence[int]) -> Any:
    """torch-pruning's group of what goes when only `kept` of a group's channels stay."""
    layer, owner = graph.model.get_submodule(group.name), group.units_of(group.name, produced=True)
    assert owner is not None
    gone = (~torch.isin(owner, torch.tensor(list(kept)))).nonzero()[:, 0].tolist()
    return graph.get_pruning_group(
        layer, graph.get_pruner_of_module(layer).prune_out_channels, gone
    )


def _remove(graph: Any, group: ChannelGroup, kept: Sequence[int]) -> None:
    try:
        found = _doomed(graph, group, kept)
        for i, item in enumerate(found):
            # A repeated index, as after a reshape, would reduce the layer's size twice.
            found[i] = type(item)(item.dep, list(dict.fromkeys(item.idxs)))
        found.prune()
    except Exception as error:  # it raises whatever its pruning functions bring up
        raise UnsupportedModelError(
            f"torch-pruning cannot remove channels of {group.name}: {type(error).__name__}: "
            f"{error}. The model is as it was; "
            f"list {group.name} in ignored."
        ) from error


def channel_mrs(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    groups: Sequence[ChannelGroup],
    form: Form = "removal",
    *,
    rho: float = 0.1,
    steps: int = 10,
    ratio: float = 0.5,
) -> dict[str, Float[Tensor, " channels"]]:
    """Layer name -> one MRS score per output channel, higher = keep, for `HippImportance`.

    Coupled layers get the same scores, which are comparable between groups: a channel's is its
    group's sensitivity times the channel's Taylor score over the group's mean. Weights, gradients,
    requires_grad and train/eval stay as they were.

    Args:
        model: any that torch-pruning traces.
        batches: inputs that were attacked already, for example by `hipp_ext.attacks.PGD`; whatever
            `loss` takes.
        loss: (model, batch) -> mean loss.
        groups: from `find_channel_groups`.
        form, rho, steps, ratio: see `hipp_ext.scorers.MRS`.

    Raises:
        CalibrationError: there are no batches.
        UnsupportedModelError: the scores came out as NaN or infinity, or a group cannot be removed.
    """
    batches = list(batches)
    if not batches:
        raise CalibrationError("channel_mrs needs at least one batch.")
    require_removable(groups)
    with evaluating(model):
        values, units = measure(
            model, groups, loss, batches, form, rho=rho, steps=steps, ratio=ratio
        )
    scores: dict[str, Tensor] = {}
    for group, value, unit in zip(groups, values, units, strict=True):
        shared = unit_shares(value, unit).float()
        if not torch.isfinite(shared).all():
            raise UnsupportedModelError(
                f"MRS gave NaN or infinity for {group.name}: weights or activations are not finite."
            )
        for layer, owner in zip(group.producers, group.producer_units, strict=True):
            before = scores.get(layer, torch.zeros(len(owner)))
            scores[layer] = torch.where(owner >= 0, shared[owner.clamp_min(0)], before)
    return scores
