"""hipp scores as a torch-pruning importance, and torch-pruning's importances as hipp scorers.

tp.pruner.BasePruner(model, example_inputs, importance=HippImportance(scores), ...)
scores = TorchPruningScorer(tp.importance.LAMPImportance())(model)
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.errors import CalibrationError, MissingExtraError, PlanError, UnsupportedModelError
from hipp_ext.groups import AttentionUnit, Group, block_of, find_groups
from hipp_ext.kinds import KINDS
from hipp_ext.modes import evaluating, training_only
from hipp_ext.projections import projection
from hipp_ext.scorers.base import Scorer, forward, per_unit, require_labels
from hipp_ext.scorers.gates import GatedGroup, Loss, unit_taylor

try:
    import torch_pruning as tp
except ModuleNotFoundError:
    raise MissingExtraError("torch-pruning", "torch-pruning") from None

OUT_HANDLERS = (
    tp.prune_conv_out_channels,
    tp.prune_depthwise_conv_out_channels,
    tp.prune_linear_out_channels,
)
IN_HANDLERS = (
    tp.prune_conv_in_channels,
    tp.prune_depthwise_conv_in_channels,
    tp.prune_linear_in_channels,
)
CHANNEL_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
UNITS: tuple[AttentionUnit, ...] = get_args(AttentionUnit)
GROUP_KEY = re.compile(rf"(language|vision)\.\d+\.({'|'.join(KINDS)})")


class HippImportance(tp.importance.Importance):
    """Scores as a torch-pruning importance: group -> one score per channel of the group's root.

    Args:
        scores: scores by group or by layer, higher = keep; both kinds may be mixed. A group such as
            "language.3.ffn" has (width,) scores, as every scorer returns them, and
            "language.3.attention" also (query heads,), because the stock pruner removes single
            query heads; "language.3.query_heads" is the same. A layer such as "layer1.0.conv2", any
            convolution, linear layer or batch norm, has (output channels,). Where several scored
            layers are coupled (a residual stream), a channel's score is their mean.
        model: model that the names belong to; None: the model that torch-pruning traced.
        skip_unscored: leave groups without any scores as they are, instead of raising.

    Raises (on construction when `model` is given, else when first called):
        PlanError: a score is NaN or infinite, has the wrong length, or names nothing in the model.
        UnsupportedModelError (when called): a group without scores that is to be pruned.

    With `iterative_steps` the layers shrink between steps: set `pruner.importance =
    HippImportance(new_scores)` before each.
    """

    def __init__(
        self,
        scores: Mapping[str, Any],  # tensors; what is not one is refused below
        *,
        model: nn.Module | None = None,
        skip_unscored: bool = False,
    ):
        self.scores = {key: _checked(key, values) for key, values in scores.items()}
        self.skip_unscored = skip_unscored
        self._model = model
        self._resolved: nn.Module | None = None
        self._consumers: dict[nn.Module, tuple[str, Tensor]] = {}  # scores per input column
        self._producers: dict[nn.Module, tuple[str, Tensor]] = {}  # scores per output channel
        if model is not None:
            self._resolve(model)

    def __call__(self, group: Any) -> Float[Tensor, " channels"] | None:
        model = self._model or getattr(group._DG, "model", None)
        if model is None:
            raise PlanError(
                "This group was made without tracing: pass HippImportance(scores, model=model)."
            )
        if model is not self._resolved:
            self._resolve(model)
        position = {int(channel): i for i, channel in enumerate(group[0].idxs)}
        total, seen = torch.zeros(len(position)), torch.zeros(len(position))
        for values, roots in self._items(group):
            index = torch.tensor([position[int(r)] for r in roots])
            total.index_add_(0, index, values)
            seen.index_add_(0, index, torch.ones_like(values))
        if not seen.any() and self.skip_unscored:
            return None
        if not seen.all():
            raise self._unscored(group, int((seen == 0).sum()), len(position))
        return total / seen

    def _unscored(self, group: Any, missing: int, channels: int) -> UnsupportedModelError:
        layers = sorted(
            {dep.target.name for dep, _ in group if isinstance(dep.layer, CHANNEL_LAYERS)}
        )
        outputs = (
            "No layer reads them: they are outputs of the model, which usually stay "
            "(ignored_layers). To score them too, give channel_mrs the groups of "
            "find_channel_groups(..., outputs=True). "
        )
        if any(isinstance(d.layer, CHANNEL_LAYERS) and d.handler in IN_HANDLERS for d, _ in group):
            outputs = ""
        return UnsupportedModelError(
            f"{missing} of {channels} channels have no scores in the group of {layers[:6]}; there "
            "are scores for "
            f"{sorted(self.scores)[:6]}. {outputs}Score one of these layers, list them in "
            "ignored_layers, or say "
            "skip_unscored=True to leave such groups as they are. Attention needs q_proj, k_proj "
            "and v_proj in num_heads."
        )

    def _items(self, group: Any) -> Iterator[tuple[Tensor, Sequence[int]]]:
        """(scores, root channels) of every scored layer in `group`."""
        for item in group:
            dep, channels = item
            layer, handler = dep.layer, dep.handler
            if not isinstance(layer, nn.Module):
                continue
            if layer in self._consumers and handler == tp.prune_linear_in_channels:
                key, values = self._consumers[layer]
                size = layer.in_features
            elif layer in self._producers and handler in (
                *OUT_HANDLERS,
                tp.prune_batchnorm_out_channels,
            ):
                key, values = self._producers[layer]
                size = output_channels(layer)
            else:
                continue
            if len(values) != size:
                raise PlanError(
                    f"The scores of {key} are for {len(values)} channels and the layer has {size} "
                    "now: it was pruned since. "
                    "Score again, and set pruner.importance = HippImportance(new_scores)."
                )
            roots = item.root_idxs
            if any(r is None for r in roots):
                raise UnsupportedModelError(
                    f"torch-pruning cannot say which channels of the group's root belong to {key}, "
                    "as under grouped-query "
                    "attention. Score its group, such as language.3.attention, instead."
                )
            yield values[list(channels)], roots

    def _resolve(self, model: nn.Module) -> None:
        self._consumers, self._producers = {}, {}
        layers = {
            n: m
            for n, m in model.named_modules()
            if isinstance(m, (*CHANNEL_LAYERS, nn.modules.batchnorm._BatchNorm))
        }
        keys = [k for k in self.scores if k not in layers]
        towers: Any = tuple(dict.fromkeys(k.split(".")[0] for k in keys if GROUP_KEY.fullmatch(k)))
        groups = {
            g.name: g
            for unit in UNITS
            for g in (find_groups(model, towers, unit, partial="report") if towers else ())
        }
        if unknown := [k for k in keys if k not in groups]:
            raise PlanError(
                f"Scores for {unknown[:4]}, which are neither groups nor layers (conv, linear, "
                "batch norm) of this "
                f"{type(model).__name__}; it has {[*groups, *layers][:8]}, ..."
            )
        for key, values in self.scores.items():
            if key in layers:
                _check_length(key, values, [output_channels(layers[key])], "output channels")
                self._producers[layers[key]] = (key, values)
            else:
                self._consumers[linear(model, groups[key].consumer)] = (
                    key,
                    _per_column(model, groups[key], values),
                )
        self._resolved = model


class TorchPruningScorer(Scorer):
    """Any torch-pruning importance as a scorer: a unit's score is the mean over its columns.

    Nothing is traced: the importance sees every group whole, rooted at the inputs of its consumer
    (o_proj, down_proj).

    Args:
        importance: a torch-pruning importance, or any callable on a group.
        gradients: whether `.grad` holds the gradients of the calibration's loss, summed over
            batches (which need `labels`), while the importance is called. None: only for
            torch-pruning's Taylor importances. False: `.grad` stays as it is.

    Raises (when called):
        CalibrationError: gradients are wanted and a batch has no labels.
        UnsupportedModelError: the importance returns nothing for a group, or another number of
            scores than channels.

    Differs from torch-pruning: under grouped-query attention the keys and values count too. A
    traced graph cannot say which query heads they belong to, so the stock importances leave them
    out.
    """

    def __init__(self, importance: Callable[[Any], Any], *, gradients: bool | None = None):
        self.importance = importance
        taylor = isinstance(importance, tp.importance.GroupTaylorImportance)
        self.needs_calibration = taylor if gradients is None else gradients  # type: ignore[misc]

    @property
    def name(self) -> str:
        return (
            f"torch-pruning {getattr(self.importance, '__name__', type(self.importance).__name__)}"
        )

    def score(
        self, model: nn.Module, groups: Sequence[Group], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        with (
            _gradients(model, groups, batches)
            if self.needs_calibration
            else contextlib.nullcontext()
        ):
            return {g.name: per_unit(self._columns(model, g), g).mean(1) for g in groups}

    def _columns(self, model: nn.Module, group: Group) -> Tensor:
        values = self.importance(traceless_group(model, group))
        size = group.width * group.columns
        if not isinstance(values, Tensor) or values.shape != (size,):
            got = (
                f"a tensor of shape {tuple(values.shape)}"
                if isinstance(values, Tensor)
                else repr(values)
            )
            raise UnsupportedModelError(
                f"{self.name} gave {got} for {group.name}, which has {size} channels; one score "
                "each is needed."
            )
        return values.detach().float()


def channel_taylor(
    model: nn.Module, batches: Iterable[Any], loss: Loss
) -> dict[str, Float[Tensor, " channels"]]:
    """Name of every conv and linear layer -> one score per output channel, higher = keep.

    Root mean square over batches of the loss's derivative with respect to a gate on the channel.
    Weights, gradients and train/eval modes stay as they were.

    Args:
        model: any model, a CNN for example; layers that the loss does not depend on score 0.
        batches: whatever `loss` takes.
        loss: (model, batch) -> scalar.

    Raises:
        CalibrationError: there are no batches.

    Source: Molchanov et al. (arXiv 1906.10771), eq. 8.
    Differs from the paper: gates stand right after the layer, before a batch norm; squares are
    averaged over batches.
    """
    batches = list(batches)
    if not batches:
        raise CalibrationError("channel_taylor needs at least one batch.")
    units = {
        name: torch.arange(output_channels(layer))
        for name, layer in model.named_modules()
        if isinstance(layer, CHANNEL_LAYERS)
    }
    groups = [
        GatedGroup(name=n, width=len(u), producers=(n,), producer_units=(u,), consumers=())
        for n, u in units.items()
    ]
    with evaluating(model):
        scores = unit_taylor(model, groups, loss, batches)
    return {g.name: s.float() for g, s in zip(groups, scores, strict=True)}


def linear(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer called `name`.

    Raises:
        UnsupportedModelError: it keeps its weight as (inputs, outputs), which torch-pruning would
            read and cut the wrong way round.
    """
    module = projection(model, name)
    if not isinstance(module, nn.Linear):
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__}, whose weight is (inputs, outputs); "
            "torch-pruning takes weights of (outputs, inputs) alone. Score with hipp_ext.scorers, "
            "and prune with hipp_ext.prune, or with PlanPruner(...).step()."
        )
    return module


def columns_of(units: Iterable[int], columns: int) -> list[int]:
    """The channels of `units`, `columns` each."""
    return [u * columns + i for u in units for i in range(columns)]


def traceless_group(
    model: nn.Module, group: Group, units: Sequence[int] | None = None, into: Any = None
) -> Any:
    """The torch-pruning group of `units` (None: all) of `group`, made without tracing.

    Its root is the input columns of the consumer, as in the stock pruner's attention groups.

    Args:
        into: an empty `tp.Group` to fill; None: a new one.
    """
    units = range(group.width) if units is None else units
    result = tp.Group() if into is None else into
    columns = columns_of(units, group.columns)
    consumer = tp.Node(linear(model, group.consumer), grad_fn=None, name=group.consumer)  # type: ignore[arg-type]
    members: list[tuple[Any, Any, list[int], list[int]]] = [
        (consumer, tp.prune_linear_in_channels, columns, list(columns))
    ]
    for part in group.produced:
        node = tp.Node(linear(model, part.layer), grad_fn=None, name=part.layer)  # type: ignore[arg-type]
        # A shared key or value belongs to its unit's first query head, so that it counts once.
        roots = [u * group.columns + i for u in units for i in range(part.size)]
        rows = [part.start + row for row in columns_of(units, part.size)]
        members.append((node, tp.prune_linear_out_channels, rows, roots))
    for node, handler, channels, roots in members:
        result.add_dep(
            tp.Dependency(tp.prune_linear_in_channels, handler, source=consumer, target=node),
            channels,
        )
        result[len(result) - 1].root_idxs = roots
    return result


def _checked(key: str, values: Any) -> Tensor:
    if not isinstance(values, Tensor) or values.ndim != 1:
        got = (
            f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        )
        raise PlanError(f"The scores of {key} must be a 1-D tensor, got {got}.")
    values = values.detach().float().cpu()
    if not torch.isfinite(values).all():
        raise PlanError(f"The scores of {key} hold NaN or infinity.")
    return values


def _check_length(key: str, values: Tensor, allowed: Sequence[int], what: str) -> None:
    if len(values) not in allowed:
        raise PlanError(
            f"{key} has {' or '.join(map(str, allowed))} {what}, and {len(values)} scores."
        )


def _per_column(model: nn.Module, group: Group, values: Tensor) -> Tensor:
    if group.kind != "attention":
        _check_length(group.name, values, [group.width], "units")
        return values.repeat_interleave(group.columns)
    heads = group.width * group.columns // block_of(model, group).head_dim
    _check_length(
        group.name, values, list(dict.fromkeys([group.width, heads])), "KV groups or query heads"
    )
    return values.repeat_interleave(group.width * group.columns // len(values))


def output_channels(layer: Any) -> int:
    """The number of output channels of a convolution, linear layer or batch norm."""
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return layer.num_features
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


@contextlib.contextmanager
def _gradients(
    model: nn.Module, groups: Sequence[Group], batches: Sequence[Batch]
) -> Iterator[None]:
    """Inside the block only the layers of `groups` hold gradients, summed over batches."""
    require_labels(batches, "This importance needs gradients")
    chosen = [
        p for g in groups for n in (*g.producers, g.consumer) for p in linear(model, n).parameters()
    ]
    before = [(p, p.grad) for p in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.grad = None
        with training_only(model, chosen):
            with torch.enable_grad():
                for batch in batches:
                    forward(model, batch, labels=True).loss.backward()
            yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
