"""Signals of the policy's state: one number per group each, measured by a scorer of its paper.

A new signal is an entry in `TRANSFORMS` and a line in `measure_columns`.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.calibration import Calibration, image_token_id
from hipp_ext.families import BLOCKS
from hipp_ext.groups import Group
from hipp_ext.scorers import MRS, SynFlow, VisualSensitivity

Column = Float[Tensor, " groups"]


def measure_columns(
    model: nn.Module,
    calibration: Calibration,
    groups: Sequence[Group],
    mrs: MRS | None,
    log: Callable[[str], None],
) -> dict[str, Column]:
    """Name -> (groups,) values of 0 or more; "visual" is 0 for kinds and towers without such a
    signal.

    Args:
        model: left as it was found.
        calibration: checked batches.
        groups: groups of the model.
        mrs: also measures "mrs", module robustness sensitivity [nats]; needs labels.
        log: called with a line before each measurement.
    """
    visual = torch.zeros(len(groups))
    seen = [i for i, g in enumerate(groups) if VisualSensitivity.scores(g)]
    if seen and image_token_id(model) is not None:
        log("measuring visual sensitivity")
        asked = [groups[i] for i in seen]
        visual[seen] = _sums(VisualSensitivity()(model, calibration, groups=asked), asked)
    log("measuring synaptic flow")
    columns = {"visual": visual, "synflow": _sums(SynFlow()(model, groups=groups), groups)}
    if mrs is not None:
        log("measuring the sensitivity of every group under attack")
        values = mrs.sensitivity(model, calibration, groups=groups)
        columns["mrs"] = torch.tensor([values[g.name] for g in groups])
    return columns


def column_passes(model: nn.Module, groups: Sequence[Group], mrs: MRS | None) -> float:
    """About how many forward passes over the calibration `measure_columns` takes, in FLOPs."""
    visual = image_token_id(model) is not None and any(map(VisualSensitivity.scores, groups))
    return float(visual) + (mrs.passes(groups) if mrs is not None else 0.0)


def standardise(x: Tensor) -> Tensor:
    """Zero mean and unit variance; zero where all values are alike."""
    x = x.float()
    deviation = x.std(unbiased=False)
    return (x - x.mean()) / deviation if float(deviation) > 1e-6 else x * 0


def by_place(values: Column, groups: Sequence[Group]) -> Column:
    """Logs, standardised within each place in a layer: flow and drift are different quantities.

    0 before the language tower, which has neither.
    """
    result = torch.zeros(len(groups))
    for place in BLOCKS:
        own = [i for i, g in enumerate(groups) if g.place == place and g.tower == "language"]
        rows = torch.tensor(own).long()
        if len(rows) and float(values[rows].max()) > 0:
            result[rows] = standardise((values[rows] + 1e-9).log())
    return result


TRANSFORMS: dict[str, Callable[[Column, Sequence[Group]], Column]] = {
    "visual": by_place,
    "synflow": lambda values, _: standardise(values),
    "mrs": lambda values, _: standardise((values + 1e-6).log()),
}
OPTIONAL = ("mrs",)  # columns that are measured only on request


def _sums(scores: Mapping[str, Tensor], groups: Sequence[Group]) -> Column:
    return torch.stack([scores[g.name].sum() for g in groups])
