"""The kinds of blocks whose units can go: how each is found, what a unit owns, how it shrinks."""

from typing import TYPE_CHECKING, Literal

from hipp_ext.kinds.attention import Attention, shares_keys
from hipp_ext.kinds.base import BlockKind, Look
from hipp_ext.kinds.expert_channels import ExpertChannels
from hipp_ext.kinds.experts import Experts
from hipp_ext.kinds.ffn import FFN
from hipp_ext.kinds.heads import shares_with_layers
from hipp_ext.kinds.latent import LatentAttention
from hipp_ext.kinds.query_heads import QueryHeads
from hipp_ext.kinds.skips import Skip
from hipp_ext.kinds.slices import Slice

__all__ = [
    "FFN",
    "KINDS",
    "Attention",
    "BlockKind",
    "ExpertChannels",
    "Experts",
    "Kind",
    "LatentAttention",
    "Look",
    "QueryHeads",
    "Skip",
    "Slice",
    "shares_keys",
    "shares_with_layers",
]

# In the order in which a layer runs them. A new kind is registered here.
KINDS: dict[str, BlockKind] = {
    kind.name: kind
    for kind in (Attention(), QueryHeads(), LatentAttention(), FFN(), Experts(), ExpertChannels())
}

if TYPE_CHECKING:
    Kind = str
else:  # what plans and manifests may name
    Kind = Literal[tuple(KINDS)]
