"""Keep masks -> a smaller dense model, or a masked view of the big one."""

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hipp_ext.calibration import Batch, Calibration, CalibrationLike
from hipp_ext.errors import PlanError, UnsupportedModelError
from hipp_ext.groups import (
    Group,
    block_of,
    check_loaded,
    find_groups,
    linear,
    not_plain,
    sync_sizes,
)
from hipp_ext.plan import PruningPlan
from hipp_ext.surgery.reconstruct import ROWS, compensated_weights
from hipp_ext.surgery.verification import verify_groups
from hipp_ext.units import take_units, unit_entries

Model = TypeVar("Model", bound=nn.Module)
PLAN_ATTRIBUTE = "hipp_plan"  # where a pruned model carries its plan
OWN_KEYS = (
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)  # what pruning writes into per_layer_config


def prune(
    model: Model,
    plan: PruningPlan | str | Path,
    *,
    inplace: bool = False,
    compensate: bool = False,
    calibration: CalibrationLike | None = None,
    processor: Any = None,
) -> Model:
    """A physically smaller model: the units that `plan` does not keep are sliced out of their linear layers.

    The result is an ordinary transformers model of the same class: forward, backward and generate work, the module
    tree is the same, only widths differ. Its config carries the widths in the standard `per_layer_config`, and
    `model.hipp_plan` the plan. Logits equal those under `masked(model, plan)` up to rounding.

    Args:
        model: the model the plan was made for, or one of the same shape.
        plan: from `HiPPPlanner.plan`, `PruningPlan.load`, ...; or the path of a plan file.
        inplace: change `model` itself instead of a copy. The copy holds only what stays, so it costs the memory of the
            small model; in place, `model` is no longer available as the dense one.
        compensate: also fit the layers that read the units (o_proj, down_proj) to the calibration, so that their outputs
            come as close to the dense ones as the units that stay allow; no training. Logits then differ from those under
            `masked`. Gradients of those weights are dropped, they belong to other values; requires_grad stays. What it costs:
            see `hipp_ext.surgery.reconstruct.compensated_weights`.
        calibration: a Calibration or batches to compensate on; None: the testbed's, through `processor`. Not read otherwise.
        processor: None: the one beside the weights that `model` was loaded from.

    Raises:
        CalibrationError: `compensate` without batches, or with batches that do not fit the model.
        PlanError: the plan does not fit; the message says where, and nothing was changed.
        UnsupportedModelError: a layer to be sliced is not a plain floating-point linear layer (quantised, adapted,
            parametrised, or shared with another layer), or compensation met NaN or infinite activations.
    """
    # Everything that can fail happens before the first change.
    plan = _loaded(plan)
    groups = match(model, plan)
    parts = _parts(model, groups, plan)
    batches: Sequence[Batch] = ()
    if compensate:
        batches = Calibration.of(model, calibration, processor, rows=ROWS).batches
    repaired = compensated_weights(model, groups, plan, batches) if compensate else {}

    def successor(part: _Part) -> nn.Parameter:
        old = model.get_parameter(part.name)
        weight = repaired.pop(part.name.removesuffix(".weight"), None)
        return (
            _select(old, part)
            if weight is None
            else nn.Parameter(weight, requires_grad=old.requires_grad)
        )

    if inplace:
        # One at a time, each old weight let go before the next is sliced: the memory of one weight on top.
        for part in parts:
            owner, attribute = part.name.rsplit(".", 1)
            setattr(model.get_submodule(owner), attribute, successor(part))
    else:
        # The weights to be sliced are not copied: the memo hands deepcopy the small ones instead.
        model = copy.deepcopy(
            model, {id(model.get_parameter(part.name)): successor(part) for part in parts}
        )
        forget_bound_methods(model)
    for group, entry in zip(groups, plan.groups, strict=True):
        sync_sizes(model, group, entry.keep)
    write_per_layer_config(model)
    setattr(model, PLAN_ATTRIBUTE, plan)
    return model


@contextlib.contextmanager
def masked(model: Model, plan: PruningPlan | str | Path) -> Iterator[Model]:
    """Inside the block `model` computes as if pruned by `plan`; nothing is removed, and it is as before afterwards.

    The inputs of every consumer (o_proj, down_proj) are multiplied by the keep mask. Same outputs as
    `prune(model, plan)` up to rounding, at the dense model's cost.

    Raises:
        PlanError: the plan does not fit the model.
    """
    plan, handles = _loaded(plan), []
    try:
        for group, entry in zip(match(model, plan), plan.groups, strict=True):
            if entry.keep < entry.width:
                consumer = linear(model, group.consumer)
                check_loaded(model, group.consumer)
                mask = torch.zeros(
                    group.width, device=consumer.weight.device, dtype=consumer.weight.dtype
                )
                mask[list(entry.kept)] = 1
                columns = mask.repeat_interleave(group.columns)
                handles.append(
                    consumer.register_forward_pre_hook(
                        lambda _, args, m=columns: (args[0] * m, *args[1:])
                    )
                )
        yield model
    finally:
        for handle in handles:
            handle.remove()


def zero_units(model: nn.Module, plan: PruningPlan | str | Path) -> None:
    """Set the weights and biases of the units that `plan` does not keep to zero, in place; all shapes stay.

    Producers and consumers both: a removed unit is zero on its way in, so nothing that is calibrated afterwards (GPTQ's
    error compensation, for one) has a reason to fill its columns again. Same outputs as `masked(model, plan)`.

    Raises:
        PlanError, UnsupportedModelError: as `prune`; nothing was changed.
    """
    plan = _loaded(plan)
    for name, index in removed_entries(model, plan).items():
        model.get_parameter(name).data[index] = 0
    setattr(model, PLAN_ATTRIBUTE, plan)


def _loaded(plan: PruningPlan | str | Path) -> PruningPlan:
    if isinstance(plan, PruningPlan):
        return plan
    if isinstance(plan, str | Path):
        return PruningPlan.load(plan)
    raise PlanError(
        f"A PruningPlan, or the path of a plan file, is needed, not a {type(plan).__name__}."
    )


def forget_bound_methods(model: nn.Module) -> None:
    """Give a copied model its class's methods back where a host has put its own into the instance.

    llm-compressor does so with `save_pretrained`, accelerate with `to` and `cuda`, all of them closures over the model: a copy
    would hold the same ones, save or move the original, and keep it in memory. (accelerate's `forward` is copied rightly.)
    """
    for name in [
        n for n in model.__dict__ if n != "forward" and callable(getattr(type(model), n, None))
    ]:
        del model.__dict__[name]


def match(model: nn.Module, plan: PruningPlan) -> tuple[Group, ...]:
    """The model's groups in the order of the plan's entries.

    Raises:
        PlanError: a group of the plan is not in the model or has another width or unit size, or a group of a tower
            that the plan covers is missing from the plan.
        UnsupportedModelError: see `verify_groups`.
    """
    found = {g.name: g for g in find_groups(model, plan.towers)}
    missing = sorted(set(found) - set(plan.keep_counts))
    unknown = sorted(set(plan.keep_counts) - set(found))
    wrong = [
        f"{e.name}: plan {e.width} units of {e.unit_parameters} parameters, model {found[e.name].width} units of "
        f"{found[e.name].unit_parameters}"
        for e in plan.groups
        if e.name in found
        and (e.width, e.unit_parameters) != (found[e.name].width, found[e.name].unit_parameters)
    ]
    if missing or unknown or wrong:
        problems = [f"only in the model: {missing[:4]}"] * bool(missing) + [
            f"only in the plan: {unknown[:4]}"
        ] * bool(unknown)
        raise PlanError(
            f"The plan was made for another model than this {type(model).__name__}; nothing was changed. "
            + "; ".join(problems + wrong[:4])
        )
    groups = tuple(found[e.name] for e in plan.groups)
    verify_groups(model, groups)
    return groups


def removed_entries(model: nn.Module, plan: PruningPlan) -> dict[str, Any]:
    """Parameter name -> index of its entries that belong to units `plan` does not keep.

    Raises:
        PlanError, UnsupportedModelError: as `prune`.
    """
    entries: dict[str, Any] = {}
    for part in _parts(model, match(model, plan), plan):
        parameter = model.get_parameter(part.name)
        units = parameter.shape[part.dim] // part.size
        gone = torch.tensor(sorted(set(range(units)) - set(part.kept.tolist())), dtype=torch.long)
        index = unit_entries(gone.to(parameter.device), part.size)
        entries[part.name] = index if part.dim == 0 else (slice(None), index)
    return entries


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """A parameter that loses units: `size` rows (dim 0) or columns (dim 1) belong to each, those of `kept` stay."""

    name: str
    kept: Tensor
    size: int
    dim: int


def _parts(model: nn.Module, groups: Sequence[Group], plan: PruningPlan) -> list[_Part]:
    """Every parameter that the plan makes smaller; raises UnsupportedModelError where one cannot be."""
    shared = shared_parameters(model)
    return [
        _Part(name=name, kept=torch.tensor(entry.kept), size=size, dim=dim)
        for group, entry in zip(groups, plan.groups, strict=True)
        if entry.keep < entry.width
        for name, size, dim in group_parameters(model, group, shared)
    ]


def group_parameters(
    model: nn.Module, group: Group, shared: set[int]
) -> Iterator[tuple[str, int, int]]:
    """(name, size, dim) of every parameter that a group's units own parts of: `size` rows (dim 0) or columns (dim 1) each.

    Raises:
        UnsupportedModelError: one of them cannot be sliced, see `plain_linear`.
    """
    for name, rows in zip(group.producers, group.rows, strict=True):
        layer = plain_linear(model, name, shared)
        for part in ["weight"] if layer.bias is None else ["weight", "bias"]:
            yield f"{name}.{part}", rows, 0
    plain_linear(model, group.consumer, shared)
    yield f"{group.consumer}.weight", group.columns, 1


@torch.no_grad()
def _select(parameter: nn.Parameter, part: _Part) -> nn.Parameter:
    """What stays of `parameter`, its gradient along with it."""
    taken = take_units(parameter.detach(), part.kept, part.size, part.dim)
    new = nn.Parameter(taken, requires_grad=parameter.requires_grad)
    if parameter.grad is not None:
        new.grad = take_units(parameter.grad, part.kept, part.size, part.dim)
    return new


def plain_linear(model: nn.Module, name: str, shared: set[int]) -> nn.Linear:
    """The linear layer called `name`, if its weight can be sliced; `shared` names the weights that cannot be alone.

    Raises:
        UnsupportedModelError: it is quantised, adapted, parametrised, offloaded, or shares its weight.
    """
    module = model.get_submodule(name)
    if reason := not_plain(module):
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__} {reason}; only plain floating-point nn.Linear layers can be sliced. Prune "
            "before you quantise or add adapters. Nothing was changed."
        )
    assert isinstance(module, nn.Linear)
    check_loaded(model, name)
    if id(module.weight) in shared:
        raise UnsupportedModelError(
            f"{name} shares its weight with another module and cannot be sliced alone."
        )
    return module


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that more than one module holds."""
    seen: set[int] = set()
    twice: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def write_per_layer_config(model: nn.Module) -> None:
    """Put the language tower's widths into its config as transformers' `per_layer_config`; other entries there stay.

    transformers writes and reads the field (5.15 and newer) but does not build most models from it yet;
    `hipp_ext.load_pruned` does. The flag beside it keeps the configuration loadable by `AutoConfig`.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr]
    layers = per_layer_values(config)
    for g in find_groups(model):
        if g.kind == "ffn":
            layers.setdefault(g.layer, {})["intermediate_size"] = g.width
        else:
            heads = g.width * g.columns // block_of(model, g).head_dim
            layers.setdefault(g.layer, {}).update(
                num_attention_heads=heads, num_key_value_heads=g.width
            )
    quiet_width_warnings()
    config.allow_global_per_layer_attribute_access = True
    config.per_layer_config = layers
    allot_caches_late(model)


def per_layer_values(config: Any) -> dict[int, dict[str, Any]]:
    """Layer -> what `config` says of it alone."""
    return {
        int(layer): dict(values)
        for layer, values in (config.to_dict().get("per_layer_config") or {}).items()
    }


def allot_caches_late(model: Any) -> None:
    """Have `generate` allot a static cache layer by layer, at the first token, as it does where layers are on several GPUs.

    For prefill in chunks transformers (5.17) allots it ahead, with one number of heads for all layers.
    """
    model._get_static_cache_init_shape = _no_common_shape


def _no_common_shape() -> None:
    """Of the module, not of the model: what a copy of the model holds must not lead back to the original."""


def quiet_width_warnings() -> None:
    """Keep transformers from warning of every single width that it reads from a heterogeneous config: modules know theirs."""
    logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").addFilter(
        _is_not_about_global_widths
    )


def _is_not_about_global_widths(record: logging.LogRecord) -> bool:
    return "Reading global config value for per-layer attribute" not in record.getMessage()
