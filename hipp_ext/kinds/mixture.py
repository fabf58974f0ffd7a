"""The inside of a mixture of experts: its parts, what its experts hold, its forward written out.

transformers keeps the weights of all experts of a layer in a few parameters of three dimensions,
and computes with them in fused functions, which no hook can look into. A mixture is a linear layer
all the same: for every token it adds up W_e z_e over the experts e, where W_e is the down
projection of an expert and z_e what the expert puts into it, times the router's weight of the token
(zero for an expert that the token is not sent to). The z_e of all experts, side by side, are the
inputs of one wide linear layer: the units of a mixture are read by it as those of a feed-forward
block are read by its down projection.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hipp_ext.families import EXPERTS, ROUTERS, SHARED_EXPERTS
from hipp_ext.kinds.slices import tensors_of
from hipp_ext.modes import replaced_forward

# (inputs z_e (tokens, columns), the tokens they belong to, the expert e) -> what takes their place.
Tap = Callable[[Float[Tensor, "tokens columns"], Int[Tensor, " tokens"], int], Tensor]
_TAPS = "_hipp_taps"


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


@contextlib.contextmanager
def tapped(mixture: Mixture, tap: Tap) -> Iterator[None]:
    """Inside the block the mixture computes what it did, written out, and `tap` sees or changes
    the inputs of the wide linear layer, expert by expert; see the module.

    Experts without tokens are left out. Several taps see them in the order in which they were
    attached. Gradients flow as in the fused functions.
    """
    experts = mixture.experts
    taps: list[Tap] | None = experts.__dict__.get(_TAPS)
    if taps is not None:
        taps.append(tap)
        try:
            yield
        finally:
            taps.remove(tap)
        return
    taps = experts.__dict__[_TAPS] = [tap]
    run = _run_sorted if mixture.sorted_inputs else _run
    try:
        with replaced_forward(experts, lambda *args: run(mixture, taps, *args)):
            yield
    finally:
        del experts.__dict__[_TAPS]


def _run(mixture: Mixture, taps: list[Tap], hidden: Tensor, index: Tensor, weights: Tensor) -> Any:
    """What experts add for the tokens that the router sends to them."""
    output = torch.zeros_like(hidden)
    for expert in index.unique().tolist():
        token, place = (index == expert).nonzero(as_tuple=True)
        weight = weights[token, place, None]
        z = mixture.inner(expert, hidden[token])
        z = (torch.cat([z, z.new_ones(len(z), 1)], 1) if mixture.biased else z) * weight
        z = z.to(hidden.dtype)
        for tap in taps:
            z = tap(z, token, expert)
        added = functional.linear(z, mixture.reading_weight(expert))
        output = output.index_add(0, token, added.to(output.dtype))
    return output


def _run_sorted(mixture: Mixture, taps: list[Tap], hidden: Tensor) -> Tensor:
    """What experts put out, each for all tokens, scaled beforehand."""
    of_experts = hidden.view(mixture.count, -1, hidden.shape[-1])
    token = torch.arange(of_experts.shape[1], device=hidden.device)
    outputs = []
    for expert, x in enumerate(of_experts):
        z = mixture.inner(expert, x)
        for tap in taps:
            z = tap(z, token, expert)
        outputs.append(functional.linear(z, mixture.reading_weight(expert)))
    return torch.cat(outputs)


@contextlib.contextmanager
def routed_among(mixture: Mixture, kept: Int[Tensor, " kept"]) -> Iterator[None]:
    """Inside the block tokens are sent to the experts `kept` alone, as if there were no others.

    The router decides with its rows of these experts, exactly as after pruning, and where it sends
    a token to is translated into the numbers of all experts.

    Args:
        mixture: the mixture.
        kept: numbers of the experts, ascending.
    """
    block, experts, count = mixture.block, mixture.experts, mixture.count
    router = getattr(block, mixture.router)
    counting = [m for m in (block, router) if isinstance(getattr(m, "num_experts", None), int)]
    whole: dict[tuple[str, str], Tensor] = {}

    def restrict(*_: Any) -> None:
        for name, dim in mixture.routed.items():
            owner, _, attribute = name.rpartition(".")
            store = tensors_of(block.get_submodule(owner), attribute)
            whole[owner, attribute] = store[attribute]
            store[attribute] = store[attribute].index_select(dim, kept.to(store[attribute].device))
        for module in counting:
            module.num_experts = len(kept)

    def restore(*_: Any) -> None:
        for (owner, attribute), tensor in whole.items():
            tensors_of(block.get_submodule(owner), attribute)[attribute] = tensor
        whole.clear()
        for module in counting:
            module.num_experts = count

    def translate(_: nn.Module, args: tuple) -> tuple:
        if not mixture.sorted_inputs:
            hidden, index, *weights = args
            return (hidden, kept.to(index.device)[index], *weights)
        x = args[0].view(len(kept), -1, args[0].shape[-1])
        everywhere = x.new_zeros(count, *x.shape[1:])
        return (everywhere.index_copy(0, kept.to(x.device), x).flatten(0, 1),)

    def select(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        of_experts = output.view(count, -1, output.shape[-1])
        return of_experts.index_select(0, kept.to(output.device)).flatten(0, 1)

    with contextlib.ExitStack() as stack:
        stack.callback(block.register_forward_pre_hook(restrict).remove)
        stack.callback(block.register_forward_hook(restore, always_call=True).remove)
        stack.callback(experts.register_forward_pre_hook(translate).remove)
        if mixture.sorted_inputs:
            stack.callback(experts.register_forward_hook(select).remove)
        yield
