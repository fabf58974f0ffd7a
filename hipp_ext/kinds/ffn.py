"""FFN: a unit is a channel, gated or not."""

from typing import Any

from torch import nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import BLOCKS
from hipp_ext.kinds.base import BlockKind


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
        matched = self.match(block)
        assert matched is not None
        return getattr(block, matched[1]).in_features

    def check_rest(self, block: Any, name: str, width: int) -> None:
        """No other parameter may have an entry for every channel."""
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
