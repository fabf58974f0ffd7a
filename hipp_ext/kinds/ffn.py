"""FFN: a unit is a channel, gated or not."""

from typing import Any

from torch import Tensor, nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import BLOCKS
from hipp_ext.kinds.base import BlockKind
from hipp_ext.projections import inputs_of, matrix_of, outputs_of


class FFN(BlockKind):
    """Feed-forward blocks of two or three linear layers."""

    name = "ffn"
    place = "ffn"
    names = BLOCKS["ffn"]
    unit = "channels"
    fields = ("intermediate_size",)

    def find(self, layer: nn.Module) -> list[nn.Module]:
        """Children of the layer, or the layer itself, if its linear layers lie there (OPT)."""
        return super().find(layer) or ([layer] if self.match(layer) else [])

    def width(self, block: Any, name: str) -> int:
        """Number of channels."""
        return inputs_of(getattr(block, self.matched(block)[1]))

    def parts(self, block: Any, layer: str, width: int) -> list[int]:
        """A row per channel, of the gate and of the up projection where both are in one layer.

        Some projectors (Aya Vision) have both in a layer whose name does not tell.
        """
        return [1] * (outputs_of(getattr(block, layer)) // width)

    def passed_on(self, block: Any) -> tuple[Tensor, int]:
        """The up projection."""
        producers, consumer = self.matched(block)
        width = inputs_of(getattr(block, consumer))
        return matrix_of(getattr(block, producers[-1]))[-width:], 1

    def check_rest(self, block: Any, name: str, width: int) -> None:
        """No other parameter may have an entry for every channel, and no channel may depend on what
        the others are (Gemma 3n keeps those far above the mean).

        As many entries may also be those of the block's input, which a projector norms itself;
        verification then tells.
        """
        if getattr(block, "activation_sparsity", 0.0) > 0:
            raise UnsupportedModelError(
                f"{name} ({type(block).__name__}) keeps the channels that are far above the mean "
                "of all: without some of them it would keep others."
            )
        producers, _ = self.matched(block)
        if inputs_of(getattr(block, producers[0])) == width:
            return
        known = {n for names in self.names.producers for n in names} | set(self.names.consumers)
        for part, parameter in block.named_parameters():
            if part.partition(".")[0] not in known and width in parameter.shape:
                raise UnsupportedModelError(
                    f"{name}.{part} has shape {tuple(parameter.shape)}: a parameter with entries "
                    f"for the {width} channels would have to go along with them, which is not "
                    "supported."
                )

    def attributes(self, block: Any, columns: int, width: int) -> dict[str, int]:
        """Number of channels."""
        return {"intermediate_size": width}
