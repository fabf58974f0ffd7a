"""The channels of a CNN as groups, read from torch-pruning's dependency graph: scored, counted, removed.

groups = find_channel_groups(model, pictures[:1])
scores = channel_mrs(model, batches, loss, groups)         # for HippImportance
prune_channels(model, pictures[:1], {"layer1.0.conv1": (0, 3, 5), ...})
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from hipp_ext.integrations.torch_pruning_importance import OUT_HANDLERS, tp
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.errors import CalibrationError, PlanError, UnsupportedModelError
from hipp_ext.scorers.base import evaluating
from hipp_ext.scorers.mrs import Form, measure, share_out
from hipp_ext.scorers.sensitivity import ChannelGroup, Loss, Reader

IN_HANDLERS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.PReLU)


def find_channel_groups(
    model: nn.Module, example_inputs: Any, *, ignored: Sequence[nn.Module] = (), forward_fn: Callable | None = None
) -> tuple[ChannelGroup, ...]:
    """The groups of channels that can be removed, in the order of the forward pass.

    Channels that no layer reads, the model's outputs, are no group.

    Args:
        model: traced once in eval mode, and left as it was; frozen weights are traced too.
        example_inputs: one row suffices.
        ignored: layers whose output channels must stay; everything coupled with them stays too.
        forward_fn: (model, example_inputs) -> outputs; None: the inputs are unpacked into the model's call.

    Raises:
        UnsupportedModelError: torch-pruning cannot trace the model, or no channels can be removed.
    """
    with traced(model, example_inputs, ignored, forward_fn) as graph:
        found = list(graph.get_all_groups(ignored_layers=list(ignored), root_module_types=[nn.modules.conv._ConvNd, nn.Linear]))
    places = {name: i for i, (name, _) in enumerate(model.named_modules())}
    groups = [g for g in (_channel_group(f, places) for f in found) if g.readers]
    if not groups:
        raise UnsupportedModelError(
            f"No channels of this {type(model).__name__} can be removed: no conv or linear layer was found whose outputs "
            "another one reads. Custom attention or recurrent layers are not traced."
        )
    return tuple(sorted(groups, key=lambda g: places[g.name]))


@contextlib.contextmanager
def traced(
    model: nn.Module, example_inputs: Any, ignored: Sequence[nn.Module] = (), forward_fn: Callable | None = None
) -> Iterator[Any]:
    """torch-pruning's dependency graph of `model`; train/eval and requires_grad are as before afterwards.

    Raises:
        UnsupportedModelError: the model cannot be traced, or does not run on `example_inputs`.
    """
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with evaluating(model), warnings.catch_warnings(), torch.enable_grad():
        warnings.filterwarnings("ignore", "Unwrapped parameters detected")
        try:
            # A frozen layer leaves no trace in autograd, and would be left whole without a word.
            model.requires_grad_(True)
            try:
                host: Any = tp.DependencyGraph()  # its annotations know no None
                graph = host.build_dependency(model, example_inputs, forward_fn)
            except Exception as error:  # whatever a forward or the tracer raises
                raise UnsupportedModelError(
                    f"torch-pruning cannot trace this {type(model).__name__}: {type(error).__name__}: {error}. Outputs must be "
                    "tensors that depend on the weights through autograd; say forward_fn where the call is not model(inputs)."
                ) from error
            yield graph
        finally:
            for name, p in model.named_parameters():
                p.requires_grad_(flags.get(name, True))


def prune_channels(
    model: nn.Module, example_inputs: Any, kept: Mapping[str, Sequence[int]], *, forward_fn: Callable | None = None
) -> None:
    """Remove channels in place, and everything that depends on them.

    Args:
        model: weights that stay keep their values to the bit.
        example_inputs: one row; the pruned model runs on it once.
        kept: group name -> indices of the channels that stay, as `find_channel_groups` names them; other groups stay whole.
        forward_fn: as for `find_channel_groups`.

    Raises:
        PlanError: a name is no group, an index is out of range or twice there, or a group would lose all channels; nothing was
            changed.
        UnsupportedModelError: the model cannot be traced, or does not run any more.
    """
    groups = {g.name: g for g in find_channel_groups(model, example_inputs, forward_fn=forward_fn)}
    for name, channels in kept.items():
        if name not in groups:
            raise PlanError(f"{name} is no group of channels of this {type(model).__name__}; it has {list(groups)[:8]}, ...")
        if not channels or len(set(channels)) < len(channels) or not set(channels) <= set(range(groups[name].width)):
            raise PlanError(
                f"{name} has channels 0 to {groups[name].width - 1}, of which one at least must stay; got "
                f"{list(channels)[:12]}."
            )
    with traced(model, example_inputs, forward_fn=forward_fn) as graph:
        for name, channels in kept.items():
            gone = sorted(set(range(groups[name].width)) - set(channels))
            if gone:
                layer = model.get_submodule(name)
                handler = graph.get_pruner_of_module(layer).prune_out_channels
                graph.get_pruning_group(layer, handler, gone).prune()
    for name, channels in kept.items():
        if model.get_submodule(name).weight.shape[0] != len(channels):  # type: ignore[union-attr]
            raise UnsupportedModelError(f"torch-pruning left {name} as it was; {len(channels)} of its channels were to stay.")
    try:
        with evaluating(model), torch.no_grad():
            forward_fn(model, example_inputs) if forward_fn else run(model, example_inputs)
    except Exception as error:
        raise UnsupportedModelError(
            f"This {type(model).__name__} ran before its channels were removed and does not now ({error}): its forward takes "
            "sizes from elsewhere than its layers. List the layers in question in ignored."
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
    """Name of every layer of `groups` -> one MRS score per output channel, higher = keep: for `HippImportance`.

    Coupled layers get the same scores, which are comparable between groups: a channel's is its group's sensitivity times the
    channel's Taylor score over the group's mean. Weights, gradients, requires_grad and train/eval stay as they were.

    Args:
        model: any that torch-pruning traces.
        batches: inputs that were attacked already, for example by `hipp_ext.attacks.PGD`; whatever `loss` takes.
        loss: (model, batch) -> mean loss.
        groups: from `find_channel_groups`.
        form, rho, steps, ratio: see `hipp_ext.scorers.MRS`.

    Raises:
        CalibrationError: there are no batches.
        UnsupportedModelError: the scores came out as NaN or infinity.
    """
    batches = list(batches)
    if not batches:
        raise CalibrationError("channel_mrs needs at least one batch.")
    with evaluating(model):
        values, units = measure(model, groups, loss, batches, form, rho=rho, steps=steps, ratio=ratio)
    scores: dict[str, Tensor] = {}
    for group, value, unit in zip(groups, values, units, strict=True):
        shared = share_out(value, unit).float()
        if not torch.isfinite(shared).all():
            raise UnsupportedModelError(f"MRS gave NaN or infinity for {group.name}: weights or activations are not finite.")
        for layer, owner in zip(group.layers, group.owners, strict=True):
            before = scores.get(layer, torch.zeros(len(owner)))
            scores[layer] = torch.where(owner >= 0, shared[owner.clamp_min(0)], before)
    return scores


def run(model: nn.Module, inputs: Any) -> Any:
    """`model` on inputs given as a mapping, a sequence or a tensor."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, list | tuple) else model(inputs)


def _channel_group(found: Any, places: Mapping[str, int]) -> ChannelGroup:
    """Ours for torch-pruning's, named after the first layer whose output channels are the units one by one."""
    width = len(found[0].idxs)
    producers: dict[str, Tensor] = {}
    readers: dict[str, Tensor] = {}
    followers: dict[str, int] = {}
    for item in found:
        dep, layer = item.dep, item.dep.target.module
        if isinstance(layer, NORMS):
            name = dep.target.name.split(" (")[0]
            followers |= {f"{name}.{p}": len(item.idxs) // width for p, v in layer.named_parameters() if v.numel() > 1}
        if not isinstance(layer, nn.modules.conv._ConvNd | nn.Linear) or dep.handler not in (*OUT_HANDLERS, *IN_HANDLERS):
            continue
        name = dep.target.name.split(" (")[0]
        if any(r is None for r in item.root_idxs):
            raise UnsupportedModelError(f"torch-pruning cannot say which channels reach {name}; list it in ignored.")
        out = dep.handler in OUT_HANDLERS
        size = layer.weight.shape[0] if out else _inputs(layer)
        owner = (producers if out else readers).setdefault(name, torch.full((size,), -1))
        owner[torch.tensor([int(i) for i in item.idxs])] = torch.tensor([int(r) for r in item.root_idxs])
    names = sorted(producers, key=places.__getitem__)
    own = torch.arange(width)
    return ChannelGroup(
        name=next(n for n in names if torch.equal(producers[n], own)), width=width,
        weights=tuple(f"{n}.weight" for n in names), owners=tuple(producers[n] for n in names),
        readers=tuple(Reader(layer=n, units=readers[n]) for n in sorted(readers, key=places.__getitem__)),
        followers=tuple(followers.items()),
    )  # fmt: skip


def _inputs(layer: Any) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
