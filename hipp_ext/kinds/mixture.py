"""The inside of a mixture of experts: its parts, and the forward of its experts written out.

transformers keeps the weights of all experts of a layer in a few parameters of three dimensions,
and computes with them in fused functions, which no hook can look into. A mixture is a linear layer
all the same: for every token it adds up W_e z_e over the experts e, where W_e is the down
projection of an expert and z_e what the expert puts into it, times the router's weight of the token
(zero for an expert that the token is not sent to). The z_e of all experts, side by side, are the
inputs of one wide linear layer: the units of a mixture are read by it as those of a feed-forward
block are read by its down projection.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from hipp_ext.families import EXPERTS, ROUTERS, SHARED_EXPERTS


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """A block of a router and experts.

    Attributes:
        block: the block.
        experts: its module with the weights of all routed experts.
        router: name of the part of the block that decides where tokens go.
        sorted_inputs: whether the block hands every expert a copy of every token, scaled by the
            router's weight (Llama 4); otherwise the experts are told which tokens are theirs.
    """

    block: Any
    experts: Any
    router: str
    sorted_inputs: bool

    @classmethod
    def of(cls, block: nn.Module) -> "Mixture | None":
        """The mixture in a block; None where it has no experts of a known shape."""
        experts: Any = getattr(block, EXPERTS, None)
        routers = [name for name in ROUTERS if isinstance(getattr(block, name, None), nn.Module)]
        down = getattr(experts, "_parameters", {}).get("down_proj")
        if down is None or down.dim() != 3 or len(routers) != 1:
            return None
        takes = list(inspect.signature(type(experts).forward).parameters)[1:]
        fused = hasattr(experts, "is_transposed") and len(takes) == 3
        if not fused and takes != ["hidden_states"]:
            return None
        return cls(block=block, experts=experts, router=routers[0], sorted_inputs=not fused)

    @property
    def count(self) -> int:
        """Number of experts."""
        return self.experts.down_proj.shape[0]

    @property
    def channel_dim(self) -> int:
        """Dimension of the down projections that the channels of an expert lie along."""
        return 1 if self.transposed else 2

    @property
    def width(self) -> int:
        """Channels of an expert."""
        return self.experts.down_proj.shape[self.channel_dim]

    @property
    def hidden(self) -> int:
        """Size of the hidden states."""
        return self.experts.down_proj.shape[3 - self.channel_dim]

    @property
    def transposed(self) -> bool:
        """Whether weights are stored (inputs, outputs), and not (outputs, inputs)."""
        return getattr(self.experts, "is_transposed", True)

    @property
    def gated(self) -> bool:
        """Whether gate and up projections are fused into one parameter."""
        return getattr(self.experts, "has_gate", True)

    @property
    def interleaved(self) -> bool:
        """Whether the rows of gate and up projection alternate, instead of lying one after the
        other.
        """
        return self.gated and not getattr(self.experts, "is_concatenated", True)

    @property
    def biased(self) -> bool:
        """Whether the experts' projections have biases."""
        return getattr(self.experts, "has_bias", False)

    @property
    def up(self) -> str:
        """Name of the parameter that makes the channels."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def top_k(self) -> int:
        """Experts that a token is sent to."""
        router = getattr(self.block, self.router)
        return getattr(router, "top_k", None) or self.block.top_k

    @property
    def sections(self) -> int:
        """Equal groups of experts that the router chooses among first; 1: none."""
        router = getattr(self.block, self.router)
        limited = getattr(router, "topk_method", "") != "greedy"
        return (getattr(router, "num_group", None) or 1) if limited else 1

    @property
    def least(self) -> int:
        """The smallest number of experts that the router can work with."""
        router = getattr(self.block, self.router)
        if not hasattr(router, "num_group"):
            return self.top_k
        # A group is judged by its best two experts; all tokens must find top_k in its best groups.
        chosen = router.topk_group if self.sections > 1 else 1
        return self.sections * max(2, -(-self.top_k // chosen))

    @property
    def columns(self) -> int:
        """Inputs that one expert has in the wide linear layer: its channels, and a one, times the
        router's weight, for its bias.
        """
        return self.width + self.biased

    def reading_weight(self, expert: int) -> Float[Tensor, "hidden columns"]:
        """The weight that reads an expert's inputs, its bias included."""
        weight = self.experts.down_proj[expert]
        weight = weight.T if self.transposed else weight
        if self.biased:
            weight = torch.cat([weight, self.experts.down_proj_bias[expert, :, None]], 1)
        return weight

    def shared(self) -> list[str]:
        """Names of the parts of the block that every token passes."""
        return [n for n in SHARED_EXPERTS if isinstance(getattr(self.block, n, None), nn.Module)]

    @functools.cached_property
    def routed(self) -> dict[str, int]:
        """Parameter or buffer of the block with an entry for every expert, those of the experts
        apart -> the dimension along which the entries lie.
        """
        others = (EXPERTS, *self.shared())
        tensors = [*self.block.named_parameters(), *self.block.named_buffers()]
        return {
            name: tensor.shape.index(self.count)
            for name, tensor in tensors
            if name.partition(".")[0] not in others and self.count in tensor.shape
        }

    def inner(self, expert: int, x: Float[Tensor, "tokens hidden"]) -> Tensor:
        """The channels of an expert, for its tokens."""
        weight = getattr(self.experts, self.up)[expert]
        bias = getattr(self.experts, f"{self.up}_bias")[expert] if self.biased else None
        put_in = functional.linear(x, weight.T if self.transposed else weight, bias)
        if hasattr(self.experts, "_apply_gate") and self.gated:
            return self.experts._apply_gate(put_in)
        if not self.gated:
            return self.experts.act_fn(put_in)
        gate, up = put_in.chunk(2, -1)
        return up * self.experts.act_fn(gate)
