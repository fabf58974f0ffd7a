"""What llm-compressor is given: sparsities taken from a plan, and calibration samples that it does
not silently drop.

Needs no llm-compressor.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from hipp_ext.calibration import image_token_id
from hipp_ext.errors import CalibrationError, PlanError
from hipp_ext.groups import Kind, Tower
from hipp_ext.plan import PruningPlan

Samples = TypeVar("Samples", bound=Iterable[Mapping[str, Any]])
UNTRACED = ("basic", "datafree")  # pipelines that run the model as it is


def sparsity_per_layer(
    plan: PruningPlan, *, tower: Tower = "language", kind: Kind | None = None
) -> list[float]:
    """Share of its prunable parameters that `plan` removes from every layer of a tower, in [0, 1),
    in the layers' order.

    The list that `WandaPruningModifier` and `SparseGPTModifier` take as `sparsity`, one number per
    module that `targets`
    matches: the plan's allocation, carried out by unstructured pruning.

        WandaPruningModifier(targets=["LlamaDecoderLayer"], sparsity=sparsity_per_layer(plan))
        WandaPruningModifier(targets=["LlamaMLP"], sparsity=sparsity_per_layer(plan, kind="ffn"))

    Args:
        plan: its keep counts are used, not which units stay.
        tower: "language" or "vision".
        kind: only the groups of this kind, such as "attention" or "ffn"; None: all together, by
            parameters.

    Raises:
        PlanError: the plan has no such groups.
    """
    total: dict[int, int] = {}
    kept: dict[int, int] = {}
    for g in plan.groups:
        if g.tower == tower and kind in (None, g.kind):
            total[g.layer] = total.get(g.layer, 0) + g.width * g.unit_parameters
            kept[g.layer] = kept.get(g.layer, 0) + g.keep * g.unit_parameters
    if not total:
        raise PlanError(
            f"The plan has no {kind or 'group'} of the {tower} tower; it covers "
            f"{sorted(plan.keep_counts)[:6]}."
        )
    return [1 - kept[layer] / total[layer] for layer in sorted(total)]


def validate_calibration(
    model: nn.Module, data: Samples, *, pipeline: str = "independent"
) -> Samples:
    """`data`, if llm-compressor will calibrate `model` on all of it; so that it can stand in the
    call of `oneshot`.

    The sequential pipeline, which "independent" takes for every modifier that needs data, traces
    the model with the first sample and replays that trace for all the others. If the first one has
    no image, the branch that reads images is not
    in the trace: the images of all later samples are dropped without a word, and the vision tower
        never runs. If the first has
    one and a later one has not, calibration breaks off in the middle. So all samples must have the
    same fields. (By default `oneshot` also shuffles; which sample comes first is chance.)

    Args:
        model: to be calibrated.
        data: samples or batches: a `datasets.Dataset` with input_ids, a DataLoader, or a list. Read
            through once.
        pipeline: as given to `oneshot`; "basic" does not trace and takes mixed samples.

    Raises:
        CalibrationError: no samples, an iterator that can be read only once, samples with different
            fields, or image tokens without images (or the reverse).
    """
    if iter(data) is data:
        raise CalibrationError(
            f"The calibration is a {type(data).__name__}, which can be read only once; pass a "
            "list, Dataset or DataLoader."
        )
    token = image_token_id(model)
    first: frozenset[str] | None = None
    for i, sample in enumerate(data):
        fields = frozenset(name for name, value in sample.items() if value is not None)
        _check_images(fields, sample, i, token)
        first = fields if first is None else first
        if fields != first and pipeline not in UNTRACED:
            raise CalibrationError(_mixed(first, fields, i, pipeline))
    if first is None:
        raise CalibrationError("The calibration holds no samples.")
    return data


def _check_images(
    fields: frozenset[str], sample: Mapping[str, Any], index: int, token: int | None
) -> None:
    if "input_ids" not in fields:
        raise CalibrationError(
            f"Calibration sample {index} has no input_ids, only {sorted(fields)}: apply the "
            "processor first."
        )
    if token is None:
        return
    images = int((torch.as_tensor(sample["input_ids"]) == token).sum())
    if bool(images) != ("pixel_values" in fields):
        raise CalibrationError(
            f"Calibration sample {index} has {images} image tokens (id {token}) and "
            f"{'pixel_values' if 'pixel_values' in fields else 'no pixel_values'}: was it cut "
            "short, or made by the "
            "processor of another model?"
        )


def _mixed(first: frozenset[str], fields: frozenset[str], index: int, pipeline: str) -> str:
    late, gone = sorted(fields - first), sorted(first - fields)
    if "pixel_values" in late:
        outcome = "its image, and that of every later sample, would be dropped without a word"
    else:
        outcome = (
            "calibration would break off there"
            if gone
            else f"its {late} would be dropped without a word"
        )
    change = " and ".join([f"has {late}"] * bool(late) + [f"lacks {gone}"] * bool(gone))
    return (
        f"Calibration sample {index} {change}, other than sample 0. The pipeline {pipeline!r} "
        "traces the model with the "
        f"first sample only, so {outcome}. Calibrate on samples with the same fields, all with "
        "images (to see images) or "
        'none, or call oneshot(..., pipeline="basic") and validate_calibration(..., '
        'pipeline="basic").'
    )
