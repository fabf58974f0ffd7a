"""The kinds of blocks whose units can go: how each is found, what a unit owns, how it shrinks."""

from typing import TYPE_CHECKING, Literal

from hipp_ext.kinds.attention import Attention, QueryHeads, divides_into_queries, shares_keys
from hipp_ext.kinds.base import BlockKind, Skip
from hipp_ext.kinds.ffn import FFN
from hipp_ext.kinds.slices import Slice

__all__ = [
    "FFN",
    "KINDS",
    "Attention",
    "BlockKind",
    "Kind",
    "QueryHeads",
    "Skip",
    "Slice",
    "divides_into_queries",
    "shares_keys",
]

# In the order in which a layer runs them. A new kind is registered here.
KINDS: dict[str, BlockKind] = {kind.name: kind for kind in (Attention(), QueryHeads(), FFN())}

if TYPE_CHECKING:
    Kind = str
else:  # what plans and manifests may name
    Kind = Literal[tuple(KINDS)]
