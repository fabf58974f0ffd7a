"""One rank's compressor and counts, and how they are saved and resumed."""

import warnings
from collections.abc import Mapping
from typing import Any

from hipp_ext.comm.compressor import Compressor
from hipp_ext.comm.saving import (
    Counts,
    SavedState,
    pack_state,
    parse_state,
    put_state,
    unpack_state,
)
from hipp_ext.errors import CompressionError
from hipp_ext.quantities import finite_option


class Resumable:
    """Base of `LQSGDState`: what a rank saves and loads.

    Attributes:
        counts: steps and bytes so far, and the loss scale.
    """

    def __init__(self) -> None:
        self.counts = Counts()
        self._compressor: Compressor | None = None
        self._pending: SavedState | None = None  # loaded before the layout is known
        self._shapes: dict[str, list[int]] = {}
        self._compared = False  # whether the ranks have compared their factors

    @property
    def compressor(self) -> Compressor:
        """The compressor.

        Raises:
            CompressionError: the state was made without parameters, and no step has been taken.
        """
        if self._compressor is None:
            raise CompressionError(
                "This state was made without parameters: its layout is known after the first step."
            )
        return self._compressor

    def set_loss_scale(self, scale: float) -> None:
        """Set the factor of the loss (GradScaler.get_scale()), and rescale the residual with it.

        Without this call a change of the scale gives the residual a wrong weight for one step.
        """
        try:
            scale = finite_option("scale", scale, CompressionError)
        except CompressionError:
            message = f"The loss scale {scale!r} is not a finite number above 0."
            raise CompressionError(message) from None
        for residual in self._compressor.residual.values() if self._compressor else ():
            residual.mul_(scale / self.counts.loss_scale)
        self.counts.loss_scale = scale

    def state_dict(self) -> dict[str, Any]:
        """This rank's residual, factors and counts: tensors by parameter name, and plain types.

        Each rank saves its own.

        Raises:
            CompressionError: the state was made without parameters, and no step has been taken.
        """
        return pack_state(self.compressor, self.counts)

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go on, bit-identically, from what `state_dict` returned on this rank.

        If it was saved with another number of workers, the shared factors are kept and this rank's
        residual is set to zero. A state made without parameters takes it at the first step; what
        does not fit is then an error of all ranks.

        Returns:
            Lines on what had to be dropped, also given as warnings; empty if nothing was.

        Raises:
            CompressionError: the state is malformed, of another rank, or of other parameters.
        """
        return self._take(parse_state(state), unpack_state)

    def take_saved(self, saved: SavedState) -> None:
        """Go on from a state of this rank that fits; at the first step if the layout is unknown."""
        self._take(saved, put_state)

    def _take(self, saved: SavedState, copy: Any) -> list[str]:
        dropped: list[str] = []
        if self._compressor is None:
            self._pending = saved
        else:
            dropped = copy(self._compressor, saved)
            self.counts = saved.plain.counts.model_copy()
        self._compared = False
        for line in dropped:
            warnings.warn(line, stacklevel=3)
        return dropped

    def start_over(self) -> None:
        """Reset residual, factors and counts. All ranks call this, or none."""
        self._pending, self._compared, self.counts = None, False, Counts()
        if (c := self._compressor) is not None:
            self._compressor = Compressor(
                self._shapes, c.options, workers=c.workers, position=c.position, device=c.device
            )

    def take_pending(self) -> str | None:
        """Take what was loaded before the layout was known; returns why it cannot, or None."""
        if self._pending is None:
            return None
        saved, self._pending = self._pending, None
        try:
            for line in unpack_state(self.compressor, saved):
                warnings.warn(line, stacklevel=3)
        except CompressionError as error:
            return str(error)
        self.counts = saved.plain.counts.model_copy()
        return None
