"""The kinds of blocks whose units can go: how each is found, what a unit owns, how it shrinks."""

from hipp_ext.kinds.attention import Attention
from hipp_ext.kinds.base import BlockKind, Skip, Slice
from hipp_ext.kinds.ffn import FFN

__all__ = ["FFN", "KINDS", "Attention", "BlockKind", "Skip", "Slice"]

# In the order in which a layer runs them. A new kind is registered here.
KINDS: dict[str, BlockKind] = {kind.name: kind for kind in (Attention(), FFN())}
