"""FLAPAdaptive: one threshold over the standardised fluctuation of all units."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hipp_ext.allocators.base import Allocator
from hipp_ext.allocators.global_threshold import counts_by_threshold
from hipp_ext.calibration import Calibration
from hipp_ext.scorers.base import Groups, Scores, input_moments, per_unit
from hipp_ext.scorers.flap import fluctuation


@dataclass(frozen=True, kw_only=True)
class FLAPAdaptive(Allocator):
    """Keeps the units with the highest fluctuation of all groups, until the budget is spent.

    FLAP's fluctuation metric is standardised over the channels of each group. The metric of a head
    is the mean over its channels after they were standardised.

    Source: FLAP (arXiv 2312.11983), section 3, adaptive structure search ("AL-AM").
    Differs from the paper: the metric decides how many units of a group stay; the scorer decides
    which ones. There is no bias compensation, which would help every allocator. The published code
    squares the metric in attention before it is standardised; the paper does not mention this, and
    it is left out.
    """

    needs_calibration = True

    def measure(
        self,
        model: nn.Module,
        groups: Groups,
        scores: Scores,
        calibration: Calibration | None,
        progress: bool = False,
    ) -> dict[str, Tensor]:
        """Group name -> (width,) standardised fluctuation."""
        assert calibration is not None
        moments, result = input_moments(model, groups, calibration.batches), {}
        for group in groups:
            channels = fluctuation(model, group, moments[group.name])
            deviation = channels.std(unbiased=False).clamp_min(1e-30)
            result[group.name] = per_unit((channels - channels.mean()) / deviation, group).mean(1)
        return result

    def keep_counts(self, groups: Groups, scores: Scores, measured: Any) -> tuple[int, ...]:
        return counts_by_threshold(groups, measured, self.pruning_ratio, self.bounds)
