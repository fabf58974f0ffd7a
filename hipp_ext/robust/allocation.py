"""Sensitivity per module -> how many channels stay in each, under an exact budget of multiply-accumulates or parameters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hipp_ext.errors import BudgetError, UnsupportedModelError
from hipp_ext.quantities import take_numbers
from hipp_ext.scorers.base import evaluating
from hipp_ext.scorers.group_loss import ChannelGroup, require_removable

Factor = tuple[
    int, tuple[tuple[int, int], ...]
]  # fixed channels, and (module, channels per unit) for each module it depends on


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A cost as an exact function of the channels kept per module: a sum of products of channel counts.

    Attributes:
        name: "MACs" or "parameters".
        terms: coefficient and factors of every product.
    """

    name: str
    terms: tuple[tuple[int, tuple[Factor, ...]], ...]

    def __call__(self, keeps: Sequence[int]) -> int:
        """The cost when module i keeps `keeps[i]` channels."""
        total = 0
        for coefficient, factors in self.terms:
            for fixed, shares in factors:
                coefficient *= fixed + sum(size * keeps[i] for i, size in shares)
            total += coefficient
        return total


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How few and how many channels a module may keep.

    Attributes:
        floor, cap: as shares of its width; one channel always stays.
    """

    floor: float = 0.125
    cap: float = 1.0

    def __post_init__(self) -> None:
        take_numbers(self, BudgetError, finites=("floor", "cap"))
        if not 0 <= self.floor <= self.cap <= 1:
            raise BudgetError(
                f"Bounds are shares with 0 <= floor <= cap <= 1, got floor={self.floor}, cap={self.cap}."
            )

    def of(self, widths: Sequence[int]) -> tuple[list[int], list[int]]:
        """(least, most) channels per module."""
        least = [min(n, max(1, math.ceil(n * self.floor - 1e-9))) for n in widths]
        return least, [
            max(low, int(n * self.cap + 1e-9)) for n, low in zip(widths, least, strict=True)
        ]


def default_floor(pruning_ratio: float) -> float:
    """Least share of a module's channels where the uniform plan removes `pruning_ratio`: an eighth, but at most half of what a
    module keeps in the uniform plan, so that every ratio leaves something to choose."""
    return min(0.125, (1 - pruning_ratio) / 2)


def allocate(
    sensitivity: Sequence[float],
    widths: Sequence[int],
    cost: Cost,
    budget: int,
    *,
    alpha: float = 0.25,
    bounds: Bounds | None = None,
    least: Sequence[int] | None = None,
) -> list[int]:
    """Channels to keep per module; their cost is at most `budget`, and one channel more in any module would exceed it.

    keep_i = width_i * clip(c * (sensitivity_i / geometric mean) ** alpha, floor, cap), with c as large as the budget allows;
    what rounding leaves is spent channel by channel, most sensitive modules first.

    Args:
        sensitivity: per module, above zero; only ratios count.
        alpha: 0 is the same share everywhere; larger follows the sensitivity more sharply.
        bounds: how few and how many.
        least: how few, as counts, instead of the bounds' floor.

    Raises:
        BudgetError: the budget is below the cost of the floor, or a sensitivity is negative or not finite.

    Source: the idea of MRPF (arXiv 2410.15176), abstract.
    Differs from the paper: its map from sensitivity to ratios is not public; this one is ours. A soft map: sharper ones failed
    in trials.
    """
    if len(sensitivity) != len(widths) or not all(math.isfinite(s) and s >= 0 for s in sensitivity):
        raise BudgetError(
            f"One finite sensitivity of at least zero per module is needed, {len(widths)} of them; got {list(sensitivity)}."
        )
    logs = torch.tensor([max(s, 1e-8) for s in sensitivity], dtype=torch.float64).log()
    weights = (alpha * (logs - logs.mean())).exp().tolist()
    floor, most = (bounds or Bounds()).of(widths)
    least = list(floor if least is None else least)
    if cost(least) > budget:
        raise BudgetError(
            f"A budget of {budget:,} {cost.name} cannot be met: the least allowed, {least} of {list(widths)} channels, takes "
            f"{cost(least):,}. Lower the floor or raise the budget."
        )

    def keeps(c: float) -> list[int]:
        rows = zip(widths, weights, least, most, strict=True)
        return [min(high, max(low, round(n * c * w))) for n, w, low, high in rows]

    low, high, best = 0.0, 1 / min(weights) + 1, least
    for _ in range(60):
        middle = (low + high) / 2
        if cost(keeps(middle)) <= budget:
            low, best = middle, keeps(middle)
        else:
            high = middle
    return spend(best, most, cost, budget, sorted(range(len(widths)), key=lambda i: -weights[i]))


def spend(
    keeps: Sequence[int], most: Sequence[int], cost: Cost, budget: int, order: Sequence[int]
) -> list[int]:
    """Add channels while the budget allows, one at a time to the modules in turn, in `order`."""
    result, open_ = list(keeps), list(order)
    while open_:
        for i in list(open_):
            result[i] += 1
            if result[i] > most[i] or cost(result) > budget:
                result[i] -= 1
                open_.remove(i)
    return result


def uniform_counts(widths: Sequence[int], pruning_ratio: float) -> list[int]:
    """The same share of every module, one channel at least.

    Raises:
        BudgetError: the ratio is not in [0, 1).
    """
    if not 0 <= pruning_ratio < 1:
        raise BudgetError(
            f"pruning_ratio is the share of channels to remove, at least 0 and below 1; got {pruning_ratio}."
        )
    return [max(1, round(n * (1 - pruning_ratio))) for n in widths]


def channel_costs(
    model: nn.Module, example_inputs: Any, modules: Sequence[ChannelGroup]
) -> tuple[Cost, Cost]:
    """(MACs, parameters) of `model` as functions of the channels kept in `modules`.

    MACs are those of convolutions and linear layers for the rows of `example_inputs` (give one). Parameters are all of the
    model's, of whatever layers: what torch-pruning takes of each with a channel goes with the channel.

    Args:
        modules: from `find_channel_groups`.

    Raises:
        UnsupportedModelError: a layer with several, but not depthwise, groups; units of different sizes in one module; or a
            module whose channels cannot be removed. The message names the layer.
    """
    require_removable(modules)
    positions = _positions(model, example_inputs)
    macs = []
    for name, layer in _channel_layers(model).items():
        outs, ins = (
            _factor(name, layer, modules, produced=True),
            _factor(name, layer, modules, produced=False),
        )
        if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups not in (
            1,
            layer.in_channels,
        ):
            raise UnsupportedModelError(
                f"{name} has {layer.groups} groups; only plain and depthwise convolutions are counted."
            )
        depthwise = (
            isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1
        )  # one input each
        macs.append(
            (
                positions.get(name, 0) * layer.weight[0, 0].numel(),
                (outs,) if depthwise else (outs, ins),
            )
        )
    return Cost(name="MACs", terms=tuple(macs)), Cost(
        name="parameters", terms=_parameter_terms(model, modules)
    )


def _parameter_terms(
    model: nn.Module, modules: Sequence[ChannelGroup]
) -> tuple[tuple[int, tuple[Factor, ...]], ...]:
    """One product of sizes for every parameter that channels take something of, and the rest as one number."""
    cut: dict[str, dict[int, list[tuple[int, int]]]] = {}
    for i, module in enumerate(modules):
        if not module.shares:
            raise UnsupportedModelError(
                f"What goes with {module.name} is not known; take modules from find_channel_groups."
            )
        for share in module.shares:
            size = _even(share.entries, share.parameter, module)
            cut.setdefault(share.parameter, {}).setdefault(share.dim, []).append((i, size))
    terms, rest = [], 0
    for name, parameter in model.named_parameters():
        coefficient, factors = 1, []
        for dim, size in enumerate(parameter.shape):
            if shares := cut.get(name, {}).get(dim):
                factors.append((size - sum(n * modules[i].width for i, n in shares), tuple(shares)))
            else:
                coefficient *= size
        if factors:
            terms.append((coefficient, tuple(factors)))
        else:
            rest += coefficient
    return (*terms, (rest, ()))


def _even(counts: torch.Tensor, name: str, module: ChannelGroup) -> int:
    if len(set(counts.tolist())) != 1:
        raise UnsupportedModelError(
            f"{name} has units of different sizes of {module.name}: {counts.tolist()[:8]}, ..."
        )
    return int(counts[0])


def _factor(name: str, layer: Any, modules: Sequence[ChannelGroup], produced: bool) -> Factor:
    if isinstance(layer, nn.Linear):
        size = layer.out_features if produced else layer.in_features
    else:
        size = layer.out_channels if produced else layer.in_channels
    shares, owned = [], 0
    for i, module in enumerate(modules):
        units = module.units_of(name, produced)
        if units is None:
            continue
        counts = torch.bincount(units[units >= 0], minlength=module.width)
        shares.append((i, _even(counts, name, module)))
        owned += int(counts.sum())
    return size - owned, tuple(shares)


def _channel_layers(model: nn.Module) -> dict[str, Any]:
    return {
        n: m for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)
    }


def _positions(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """Layer -> how often each of its weights is multiplied in one forward pass: per output position, or transposed, input."""
    from hipp_ext.integrations.torch_pruning_channels import run

    positions: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(layer: Any, inputs: tuple, output: Any) -> None:
            x = inputs[0] if getattr(layer, "transposed", False) else output
            width = (
                x.shape[-1]
                if isinstance(layer, nn.Linear)
                else x.shape[-len(layer.kernel_size) - 1]
            )
            positions[name] = positions.get(name, 0) + x.numel() // width

        return hook

    hooks = [
        layer.register_forward_hook(count(name)) for name, layer in _channel_layers(model).items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            run(model, example_inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return positions


def global_counts(
    ranking: Sequence[torch.Tensor], cost: Cost, budget: int, *, bounds: Bounds | None = None
) -> list[int]:
    """Channels to keep per module when one threshold ranks all channels of all modules; within `budget`, as `allocate`.

    Args:
        ranking: per module one score per channel, higher = keep; divided by the module's mean first.

    Raises:
        BudgetError: the budget is below the cost of the floor.
    """
    scaled = [r.double() / r.double().mean().clamp_min(1e-30) for r in ranking]
    least, most = (bounds or Bounds()).of([len(r) for r in ranking])
    if cost(least) > budget:
        raise BudgetError(
            f"A budget of {budget:,} {cost.name} cannot be met: the least allowed takes {cost(least):,}."
        )
    best = least
    low, high = 0, sum(len(r) for r in scaled)
    together = torch.cat(scaled).sort(descending=True).values
    while low < high:  # the most channels whose cost fits
        middle = (low + high + 1) // 2
        threshold = together[middle - 1]
        keeps = [
            min(m, max(n, int((r >= threshold).sum())))
            for r, n, m in zip(scaled, least, most, strict=True)
        ]
        if cost(keeps) <= budget:
            low, best = middle, keeps
        else:
            high = middle - 1
    return spend(best, most, cost, budget, range(len(best)))
