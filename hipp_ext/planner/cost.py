"""What "compression" counts: parameters, FLOPs, or time measured on this machine."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.errors import BudgetError, CheckpointError
from hipp_ext.files import write_atomic
from hipp_ext.files.sealed import seal, unseal
from hipp_ext.groups import Group, block_of, linear

CostKind = Literal["parameters", "flops", "latency"]
KNOTS = 9  # shares of a group at which latency is measured: 0, 1/8, ..., 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Cost:
    """Cost of the groups as a function of the shares that stay; `removed` is the objective "compression".

    The budget `pruning_ratio` is always counted in parameters, exactly; this is what the search is rewarded for.

    Attributes:
        kind: what was counted.
        table: (groups, knots) cost at shares 0 to 1 in equal steps, linear in between: parameters, FLOPs per token, or seconds.
    """

    kind: CostKind
    table: Float[Tensor, "groups knots"]

    def removed(self, shares: Float[Tensor, "plans groups"]) -> Float[Tensor, " plans"]:
        """Share of the groups' dense cost that plans with these keep shares save, at most 1; more = smaller or faster."""
        last = self.table.shape[1] - 1
        position = shares.double().clamp(0, 1) * last
        left = position.floor().clamp(max=last - 1).long()
        rows = torch.arange(len(self.table)).expand_as(left)
        low, high = self.table[rows, left], self.table[rows, left + 1]
        return 1 - (low + (high - low) * (position - left)).sum(1) / self.table[:, -1].sum()


def check_cost(kind: str) -> None:
    """Raise BudgetError unless `kind` is one of CostKind."""
    if kind not in get_args(CostKind):
        raise BudgetError(f"cost={kind!r}: one of {', '.join(get_args(CostKind))} is needed.")


def measure_cost(
    model: nn.Module, groups: Sequence[Group], kind: CostKind, *, tokens: int = 640
) -> Cost:
    """The cost of `model`'s groups.

    Args:
        kind: "parameters"; "flops": two per multiply-accumulate, per token with `tokens` keys in context; "latency": seconds
            of the groups' linear layers and attention for one sequence of `tokens`, where the model is, one measurement per
            distinct shape. Latency differs from run to run.
        tokens: length of a typical prompt; LLaVA-1.5's picture alone takes 576.

    Raises:
        BudgetError: an unknown kind.
    """
    check_cost(kind)
    if kind == "latency":
        known = {_shape(model, g): g for g in groups}
        seconds = {shape: _seconds(model, g, tokens) for shape, g in known.items()}
        return Cost(
            kind=kind,
            table=torch.tensor([seconds[_shape(model, g)] for g in groups], dtype=torch.float64),
        )
    unit = [
        g.unit_parameters if kind == "parameters" else g.unit_flops + g.context_flops(tokens)
        for g in groups
    ]
    full = torch.tensor(
        [float(g.width * u) for g, u in zip(groups, unit, strict=True)], dtype=torch.float64
    )
    return Cost(kind=kind, table=torch.stack([full * 0, full], 1))


def fit_cost(
    model: nn.Module, groups: Sequence[Group], kind: CostKind, folder: Path | None
) -> Cost:
    """`measure_cost`; latency is kept in `folder`, so that a resumed fit counts with the seconds it began with.

    Raises:
        CheckpointError: what is kept there is damaged.
    """
    path = folder / "latency.safetensors" if folder and kind == "latency" else None
    if path is None:
        return measure_cost(model, groups, kind)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, seal({"table": measure_cost(model, groups, kind).table}))
    try:
        table = unseal(path)[0]["table"]
        found = len(table)
    except (CheckpointError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}. Remove {folder} to start again."
        ) from None
    if found != len(groups):
        raise CheckpointError(
            f"{path} holds the seconds of another model: {found} groups, not {len(groups)}."
        )
    return read_cost(kind, table, len(groups))


def read_cost(kind: CostKind, table: Tensor, groups: int) -> Cost:
    """The cost of a table from a file.

    Raises:
        CheckpointError: no cost of so many groups looks like that.
    """
    fits = (
        table.dim() == 2
        and table.shape[0] == groups
        and table.shape[1] >= 2
        and table.is_floating_point()
    )
    if (
        not fits
        or not bool((table.isfinite() & (table >= 0)).all())
        or not float(table[:, -1].sum()) > 0
    ):
        raise CheckpointError(
            f"A table of shape {tuple(table.shape)} is no cost of {groups} groups."
        )
    return Cost(kind=kind, table=table)


def _shape(model: nn.Module, group: Group) -> tuple:
    return (
        group.kind,
        group.width,
        group.rows,
        group.columns,
        linear(model, group.consumer).out_features,
    )


@torch.no_grad()
def _seconds(model: nn.Module, group: Group, tokens: int, repeats: int = 7) -> list[float]:
    """Median seconds of the group with each share of its units, the least first and never falling."""
    weight = linear(model, group.consumer).weight
    x = torch.randn(1, tokens, weight.shape[0], device=weight.device, dtype=weight.dtype)
    result = [0.0]
    for knot in range(1, KNOTS):
        units = max(1, round(group.width * knot / (KNOTS - 1)))
        times = []
        for _ in range(repeats + 2):
            _synchronise(weight.device)
            start = time.perf_counter()
            _run(model, group, x, units)
            _synchronise(weight.device)
            times.append(time.perf_counter() - start)
        result.append(max(result[-1], statistics.median(times[2:])))
    return result


def _run(model: nn.Module, group: Group, x: Tensor, units: int) -> None:
    inputs = [
        torch.nn.functional.linear(x, linear(model, n).weight[: units * r])
        for n, r in zip(group.producers, group.rows, strict=True)
    ]
    if group.kind == "attention":
        head = block_of(model, group).head_dim
        q, k, v = (t.unflatten(-1, (-1, head)).transpose(1, 2) for t in inputs)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        middle = mixed.flatten(2)
    else:
        middle = torch.nn.functional.silu(inputs[0]) * inputs[-1]
    torch.nn.functional.linear(
        middle, linear(model, group.consumer).weight[:, : units * group.columns]
    )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
