"""OWL: more of a group stays, the more outliers it has."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hipp_ext import budget
from hipp_ext.allocators.base import Allocator
from hipp_ext.calibration import Calibration
from hipp_ext.groups import Group, total_parameters
from hipp_ext.scorers.base import Groups, Scores, consumer_weight, input_moments


@dataclass(frozen=True, kw_only=True)
class OWL(Allocator):
    """Keeps fractions in a band of width 2 * band that grow with the outliers of a group.

    An outlier is an element of |W| * ||x||_2 above `threshold` times the mean of its matrix.

    Args:
        threshold: the paper's M.
        band: the paper's lambda.

    Source: OWL (arXiv 2310.05175), section 3, and its published code for the place of the band.
    Differs from the paper: it was made for unstructured pruning of whole layers. Here a fraction
    belongs to a group, the outliers are counted in the group's consumer (o_proj, down_proj) alone,
    the mean is weighted by parameters, and the fraction counts units. A fraction above 1 is
    clipped, and the others move together to meet the budget.
    """

    threshold: float = 5.0
    band: float = 0.08
    needs_calibration = True

    def measure(
        self,
        model: nn.Module,
        groups: Groups,
        scores: Scores,
        calibration: Calibration | None,
        progress: bool = False,
    ) -> np.ndarray:
        """(groups,) fraction of outliers in each consumer."""
        assert calibration is not None
        moments = input_moments(model, groups, calibration.batches)
        return np.array([self._outliers(model, g, moments[g.name].norm) for g in groups])

    def keep_counts(self, groups: Groups, scores: Scores, measured: Any) -> tuple[int, ...]:
        spread = measured - measured.min()
        if spread.max() > 0:
            spread = spread / spread.max() * 2 * self.band
        weight = np.array([g.parameters for g in groups]) / total_parameters(groups)
        fraction = np.clip(1 - self.pruning_ratio + spread - weight @ spread, 1e-6, 1 - 1e-6)
        logits = np.log(fraction / (1 - fraction))
        return budget.keep_counts(groups, logits.tolist(), self.pruning_ratio, self.bounds)

    @torch.no_grad()
    def _outliers(self, model: nn.Module, group: Group, input_norm: Tensor) -> float:
        weight = consumer_weight(model, group)
        importance = weight.abs().float() * input_norm.to(weight.device).float()
        return float((importance > self.threshold * importance.mean()).float().mean())
