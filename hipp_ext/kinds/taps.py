"""Looking into the experts of a mixture: their forward, written out expert by expert."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from hipp_ext.kinds.mixture import Mixture
from hipp_ext.modes import replaced_forward

# (inputs z_e (tokens, columns), the tokens they belong to, the expert e) -> what takes their place.
Tap = Callable[[Float[Tensor, "tokens columns"], Int[Tensor, " tokens"], int], Tensor]
_TAPS = "_hipp_taps"


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


def _run(
    mixture: Mixture, taps: list[Tap], hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
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
