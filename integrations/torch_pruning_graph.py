"""torch-pruning's dependency graph of a model as groups of channels, with what each channel owns.

How much a channel owns is found by torch-pruning's own pruning functions, on copies without data.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.integrations.torch_pruning_importance import (
    CHANNEL_LAYERS,
    IN_HANDLERS,
    OUT_HANDLERS,
    output_channels,
    tp,
)
from hipp_ext.modes import call, evaluating
from hipp_ext.scorers.channels import ChannelGroup, ChannelSlice
from hipp_ext.scorers.gates import Consumer

OPTYPE: Any = tp.ops.OPTYPE  # type: ignore[reportAttributeAccessIssue]
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.PReLU)
USUAL = ("weight", "bias")  # what torch-pruning slices of a convolution, a linear layer or a norm


class _Graph(tp.DependencyGraph):
    """torch-pruning's graph, which does not keep the order of the parts of a split, corrected."""

    def _trace(self, *args: Any, **kwargs: Any) -> Any:
        nodes = super()._trace(*args, **kwargs)
        for node in nodes.values():
            if node.type in (OPTYPE.SPLIT, OPTYPE.UNBIND):
                parts = [
                    [i for f, i in getattr(n.grad_fn, "next_functions", ()) if f is node.grad_fn]
                    for n in node.outputs
                ]
                if all(len(p) == 1 for p in parts):
                    order = sorted(range(len(parts)), key=parts.__getitem__)
                    node.outputs = [node.outputs[i] for i in order]
        return nodes


@contextlib.contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """If the block raises, all parameters, buffers, hooks and attributes are restored."""
    held, values = [], [(t, t.detach().clone()) for t in model.buffers()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for module in model.modules():
        inner = [
            (v, copy.copy(v)) for v in vars(module).values() if isinstance(v, dict | list | set)
        ]
        held.append((module, dict(vars(module)), inner))
    try:
        yield
    except BaseException:
        for module, attributes, inner in held:
            vars(module).clear()
            vars(module).update(attributes)
            # In place: handles of hooks look for the container that they know.
            for container, content in inner:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
        for buffer, value in values:
            buffer.detach().copy_(value)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


@contextlib.contextmanager
def traced(
    model: nn.Module,
    example_inputs: Any,
    ignored: Sequence[nn.Module] = (),
    forward_fn: Callable | None = None,
) -> Iterator[Any]:
    """torch-pruning's dependency graph of `model`, whose modes are restored afterwards.

    Raises:
        UnsupportedModelError: the model cannot be traced, or does not run on `example_inputs`.
    """
    with undone_on_error(model), evaluating(model), warnings.catch_warnings(), torch.enable_grad():
        warnings.filterwarnings("ignore", "Unwrapped parameters detected")
        # A frozen layer would leave no trace in autograd, and would silently stay whole.
        model.requires_grad_(True)
        try:
            host: Any = _Graph()  # its annotations do not allow None
            # Without forward_fn, it first tries the rows of a tensor as arguments, and then takes
            # layers for called twice.
            graph = host.build_dependency(model, example_inputs, forward_fn or call)
        except Exception as error:  # whatever a forward or the tracer raises
            raise UnsupportedModelError(
                f"torch-pruning cannot trace this {type(model).__name__}: {type(error).__name__}: "
                f"{error}. Outputs must be tensors that depend on the weights through autograd; "
                "pass forward_fn where the call is not model(inputs)."
            ) from error
        yield graph


def read_groups(
    graph: Any, ignored: Sequence[nn.Module] = ()
) -> list[ChannelGroup | UnsupportedModelError]:
    """Every group of channels, in the order of `named_modules`, or why it cannot be described.

    Raises:
        UnsupportedModelError: torch-pruning does not get through the graph.
    """
    try:
        found = list(
            graph.get_all_groups(
                ignored_layers=list(ignored), root_module_types=list(CHANNEL_LAYERS)
            )
        )
    except Exception as error:  # it raises whatever its index mappings bring up
        raise UnsupportedModelError(
            f"torch-pruning cannot group the channels of this {type(graph.model).__name__}: "
            f"{type(error).__name__}: {error}. "
            "Operations that rearrange channels are often the reason."
        ) from error
    places = {name: i for i, (name, _) in enumerate(graph.model.named_modules())}
    holders: dict[int, set[nn.Module]] = {}
    for module in graph.model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(module)
    groups = [_GroupReader(graph, f, places, holders).read() for f in found]
    return sorted(groups, key=lambda g: places[g.name] if isinstance(g, ChannelGroup) else -1)


class _GroupReader:
    """One of torch-pruning's groups as a ChannelGroup."""

    def __init__(
        self,
        graph: Any,
        found: Any,
        places: Mapping[str, int],
        holders: Mapping[int, set[nn.Module]],
    ):
        self.graph, self.found, self.places, self.holders = graph, found, places, holders
        self.root = graph._module2name[found[0].dep.target.module]
        self.width = 0
        self.producers: dict[str, Tensor] = {}
        self.consumers: dict[str, Tensor] = {}
        self.norms: dict[str, int] = {}
        self.slices: dict[tuple[str, int], Tensor] = {}
        self.obstacles: list[str] = []

    def read(self) -> ChannelGroup | UnsupportedModelError:
        try:
            units = self._units()
            for item in self.found:
                self._read_item(item, units)
        except UnsupportedModelError as error:
            return error
        names = sorted(self.producers, key=self.places.__getitem__)
        return ChannelGroup(
            name=next(n for n in names if torch.equal(self.producers[n], units)),
            width=self.width,
            producers=tuple(names),
            producer_units=tuple(self.producers[n] for n in names),
            consumers=tuple(
                Consumer(layer=n, units=self.consumers[n])
                for n in sorted(self.consumers, key=self.places.__getitem__)
            ),
            norms=tuple(self.norms.items()),
            obstacle="; ".join(dict.fromkeys(self.obstacles)),
            slices=tuple(
                ChannelSlice(parameter=n, dim=d, sizes=e) for (n, d), e in self.slices.items()
            ),
        )

    def _name(self, target: Any) -> str:
        graph, parameter = self.graph, isinstance(target, nn.Parameter)
        return (graph._param_to_name if parameter else graph._module2name)[target]

    def _units(self) -> Tensor:
        """The unit of each channel of the root; channels that end in one channel are one unit."""
        first = list(range(len(self.found[0].idxs)))

        def find(i: int) -> int:
            while first[i] != i:
                i = first[i]
            return i

        for item in self.found:
            if any(r is None for r in item.root_idxs):
                if _holds_tensors(item.dep.target.module):
                    name = self._name(item.dep.target.module)
                    raise UnsupportedModelError(
                        f"torch-pruning cannot say which channels reach {name}; list it in ignored."
                    )
                continue
            seen: dict[int, int] = {}
            for i, root in zip(item.idxs, item.root_idxs, strict=True):
                a, b = find(seen.setdefault(int(i), int(root))), find(int(root))
                first[max(a, b)] = min(a, b)
        roots = [find(i) for i in first]
        numbers = {root: n for n, root in enumerate(sorted(set(roots)))}
        self.width = len(numbers)
        return torch.tensor([numbers[r] for r in roots])

    def _read_item(self, item: Any, units: Tensor) -> None:
        dep, target = item.dep, item.dep.target.module
        if not _holds_tensors(target):
            return
        name = self._name(target)
        idxs = torch.tensor([int(i) for i in item.idxs])
        places = torch.stack([idxs, units[torch.tensor([int(r) for r in item.root_idxs])]]).unique(
            dim=1
        )
        if isinstance(target, CHANNEL_LAYERS) and dep.handler in (*OUT_HANDLERS, *IN_HANDLERS):
            self._read_layer(name, target, dep.handler, places)
        self._read_slices(name, target, dep, places)

    def _read_layer(self, name: str, layer: Any, handler: Any, places: Tensor) -> None:
        out = handler in OUT_HANDLERS
        size = output_channels(layer) if out else input_channels(layer)
        if int(places[0].max()) >= size:
            raise UnsupportedModelError(
                f"torch-pruning counts {int(places[0].max()) + 1} channels of {self.root} where "
                f"{name} has {size}: something "
                f"between them, such as a PixelShuffle, rearranges channels. List {self.root} in "
                "ignored."
            )
        owner = (self.producers if out else self.consumers).setdefault(
            name, torch.full((size,), -1)
        )
        owner[places[0]] = places[1]

    def _read_slices(self, name: str, target: Any, dep: Any, places: Tensor) -> None:
        """How much of each tensor goes with a unit, and what stands against it."""
        before = {"": target} if isinstance(target, nn.Parameter) else dict(_tensors(target))
        if obstacle := _obstacle(self.graph.model, name, target) or self._tie(name, target):
            self.obstacles.append(obstacle)
            return
        if isinstance(target, nn.Module) and _groups(target) > 1 and not _depthwise(target):
            taken = {(n, 0): 1 for n in USUAL if n in before and dep.handler in OUT_HANDLERS}
        else:
            taken = self._taken(name, target, dep, int(places[0][0]), before)
        counts = torch.bincount(places[1], minlength=self.width)
        for (tensor, dim), number in taken.items():
            key = (f"{name}.{tensor}" if tensor else name, dim)
            self.slices[key] = self.slices.get(key, 0) + number * counts
        if isinstance(target, NORMS):
            own = dict(target.named_parameters())
            self.norms |= {f"{name}.{n}": int(counts[0]) for n, d in taken if d == 0 and n in own}

    def _tie(self, name: str, target: Any) -> str:
        """With which layers `target` shares a parameter, in words; empty where with none."""
        owners, parameters = (
            ([], [target])
            if isinstance(target, nn.Parameter)
            else (target.modules(), target.parameters())
        )
        inside = set(owners)
        for holders in (self.holders[id(p)] for p in parameters):
            if (others := holders - inside) and (inside or len(holders) > 1):
                return f"{name} shares a parameter with {sorted(self._name(m) for m in others)}"
        return ""

    def _taken(
        self, name: str, target: Any, dep: Any, index: int, before: Mapping[str, Tensor]
    ) -> dict[tuple[str, int], int]:
        """(tensor, dimension) -> entries that torch-pruning removes of it with one channel."""
        hollow = copy.deepcopy(target, {id(t): _hollow(t) for t in before.values()})
        # As torch-pruning does before each call.
        dep.handler.__self__.pruning_dim = dep.target.pruning_dim
        try:
            result = dep.handler(hollow, [index])
        except Exception as error:
            self.obstacles.append(
                f"torch-pruning cannot slice {name} ({type(error).__name__}: {error})"
            )
            return {}
        after = {"": result} if isinstance(target, nn.Parameter) else dict(_tensors(hollow))
        sliced, channels = {}, dep.handler.__self__.get_out_channels(target)
        for tensor, old in before.items():
            new = after.get(tensor, old)
            differences = {
                d: a - b
                for d, (a, b) in enumerate(zip(old.shape, new.shape, strict=True))
                if a != b
            }
            if (
                not differences
                and tensor.rpartition(".")[2] not in USUAL
                and channels in old.shape
                and old.numel() > 1
            ):
                self.obstacles.append(f"torch-pruning leaves {name}.{tensor} as it is")
            sliced |= {(tensor, d): n for d, n in differences.items()}
        if isinstance(target, nn.Parameter) and (
            not sliced or index >= target.shape[next(iter(sliced))[1]]
        ):
            self.obstacles.append(
                f"torch-pruning does not know which dimension of {name} holds the channels"
            )
        return sliced


def _holds_tensors(target: Any) -> bool:
    return isinstance(target, nn.Parameter) or next(_tensors(target), None) is not None


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _hollow(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return (
        nn.Parameter(empty, requires_grad=tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else empty
    )


def _obstacle(model: nn.Module, name: str, target: Any) -> str:
    """Why torch-pruning would break `target`, in words; empty where it would not."""
    owner = (
        target if isinstance(target, nn.Module) else model.get_submodule(name.rpartition(".")[0])
    )
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase):
        return f"{name} belongs to a recurrent layer, {type(owner).__name__}"
    if isinstance(target, nn.Parameter):
        if type(owner).__module__.startswith("torch.nn."):
            return f"{name} belongs to a {type(owner).__name__}, which torch-pruning does not know"
    elif (
        isinstance(getattr(owner, "weight", None), Tensor)
        and owner._parameters.get("weight") is not owner.weight
    ):
        return (
            f"the weight of {name} is computed from other tensors (weight_norm, spectral_norm, a "
            "mask); make it plain first"
        )
    elif _groups(owner) > 1 and not _depthwise(owner) and owner.transposed:
        return f"{name} is a transposed convolution with {owner.groups} groups"
    elif (
        _groups(owner) > 1
        and not _depthwise(owner)
        and owner.groups in (owner.in_channels, owner.out_channels)
    ):
        return (
            f"{name} has {owner.in_channels} input and {owner.out_channels} output channels in "
            f"{owner.groups} groups"
        )
    return ""


def input_channels(layer: Any) -> int:
    """The number of channels that a conv or linear layer reads."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _groups(layer: nn.Module) -> int:
    return layer.groups if isinstance(layer, nn.modules.conv._ConvNd) else 1


def _depthwise(layer: Any) -> bool:
    return layer.groups == layer.in_channels == layer.out_channels
