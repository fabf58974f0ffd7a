"""KL divergence of next-token distributions, and sums over positions whose logits never stand in
memory all at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Terms = Callable[..., Tensor]


@runtime_checkable
class Distribution(Protocol):
    """What a teacher says about the next token at some positions, at its temperature."""

    def kl(self, scaled: Float[Tensor, "P vocabulary"]) -> Float[Tensor, " P"]:
        """KL(teacher || student) of each position [nats].

        Args:
            scaled: float32 logits of the student, divided by the temperature.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Full:
    """The whole distribution: log_p, the log-probabilities (P, vocabulary), float32."""

    log_p: Float[Tensor, "P vocabulary"]

    def kl(self, scaled: Float[Tensor, "P vocabulary"]) -> Float[Tensor, " P"]:
        """See `Distribution.kl`."""
        return _expected_gap(self.log_p, scaled.log_softmax(-1)).sum(-1)


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The k most likely tokens, and one bucket for all others.

    Its divergence is sum_i p_i log(p_i / q_i) over the k tokens, and r log(r / s) for the bucket,
    where r and s are what teacher and student leave for all other tokens. Merging tokens never
    increases a divergence (the log-sum inequality), so it is a lower bound of the full one; it
    grows with k up to the full one at k = vocabulary, and is 0 only where the student gives the k
    tokens the teacher's probabilities.

    Attributes:
        indices: ids of the k tokens, the most likely one first.
        log_p: their log-probabilities, float32.
        log_rest: log of the probability of all others; -inf if there is nothing left.

    Source: the bucket for what is cut off is that of Dasgupta et al. (arXiv 2602.20816), without
    their other weight of the tail. Anshumann et al. (arXiv 2503.16870) show that top-k
    probabilities without a bucket, renormalised or not, are a biased target.
    """

    indices: Int[Tensor, "P k"]
    log_p: Float[Tensor, "P k"]
    log_rest: Float[Tensor, " P"]

    @classmethod
    def of(cls, log_p: Float[Tensor, "P vocabulary"], k: int) -> "TopK":
        """The k most likely tokens of a whole distribution; all of them if there are fewer."""
        top = log_p.topk(min(k, log_p.shape[-1]))
        rest = log_p.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
        return cls(indices=top.indices, log_p=top.values, log_rest=rest)

    def first(self, k: int) -> "TopK":
        """The same with fewer tokens; the others join the bucket."""
        if k >= self.indices.shape[-1]:
            return self
        rest = torch.cat([self.log_p[:, k:], self.log_rest[:, None]], -1).logsumexp(-1)
        return TopK(indices=self.indices[:, :k], log_p=self.log_p[:, :k], log_rest=rest)

    def normalised(self) -> "TopK":
        """The same with probabilities that add up to 1, which rounded ones do not."""
        total = torch.cat([self.log_p, self.log_rest[:, None]], -1).logsumexp(-1)
        log_p, log_rest = self.log_p - total[:, None], self.log_rest - total
        return TopK(indices=self.indices, log_p=log_p, log_rest=log_rest)

    def kl(self, scaled: Float[Tensor, "P vocabulary"]) -> Float[Tensor, " P"]:
        """See `Distribution.kl`."""
        total = scaled.logsumexp(-1, keepdim=True)
        log_q = scaled.gather(-1, self.indices) - total
        of_top = _expected_gap(self.log_p, log_q).sum(-1)
        if self.indices.shape[-1] == scaled.shape[-1]:
            return of_top
        log_s = scaled.scatter(-1, self.indices, -torch.inf).logsumexp(-1) - total[:, 0]
        return of_top + _expected_gap(self.log_rest, log_s)


def _expected_gap(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q), entry by entry.

    What a model never puts out (tokens, or a bucket of nothing else) has the probability 0, and no
    part in the divergence, whatever the student's least number is.
    """
    possible = log_p > torch.finfo(torch.float32).min / 2
    return log_p.exp() * torch.where(possible, log_p - log_q, 0.0)


def chunked_sum(
    terms: Terms, hidden: Float[Tensor, "P width"], parameters: Sequence[Tensor], size: int
) -> tuple[Float[Tensor, ""], Tensor]:
    """(first entry, other entries) of the sum of `terms` over chunks of positions.

    Only the first entry can be differentiated. Gradients are computed chunk by chunk in the forward
    pass, so that the intermediate results of one chunk at a time are in memory, and nothing is
    computed twice. Until the backward pass one gradient of `hidden` and of each parameter is kept.
    Gradients of parameters are summed over the chunks in float32.

    Args:
        terms: function of a slice of the positions, their hidden states and the parameters, which
            returns a vector of sums over these positions.
        hidden: hidden states at all positions.
        parameters: what else is differentiated; they receive their gradients through the graph, as
            `DistributedDataParallel` requires, and `terms` gets copies that share their memory.
        size: positions of a chunk.
    """
    return _ChunkedSum.apply(terms, size, hidden, *parameters)  # type: ignore[return-value]


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, terms: Terms, size: int, hidden: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Copies, so that hooks on the parameters see one gradient: that of the whole.
        copies = [
            p.detach().requires_grad_(need)
            for p, need in zip(parameters, ctx.needs_input_grad[3:], strict=True)
        ]
        wanted = [p for p in copies if p.requires_grad]
        learns = any(ctx.needs_input_grad)
        of_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[2] else None
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in wanted]
        total = None
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            some = hidden[part].detach().requires_grad_(ctx.needs_input_grad[2])
            with torch.set_grad_enabled(learns):
                values = terms(part, some, *copies)
                minimised = values[0]
            if learns:
                inputs = wanted if of_hidden is None else [some, *wanted]
                found = list(_gradients(minimised, inputs))
                if of_hidden is not None:
                    of_hidden[part] = found.pop(0)
                for own, gradient in zip(sums, found, strict=True):
                    own += gradient
            total = values.detach() if total is None else total + values.detach()
        assert total is not None, "there is a position at least"
        ctx.gradients = _in_order(ctx.needs_input_grad[3:], sums, parameters)
        ctx.of_hidden = of_hidden
        others = total[1:].clone()
        ctx.mark_non_differentiable(others)
        return total[0].clone(), others

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:  # type: ignore[override]
        scaled = (
            None if own is None else own * gradient.to(own)
            for own in (ctx.of_hidden, *ctx.gradients)
        )
        return None, None, *scaled


def _gradients(value: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # A backward pass runs in the types of its forward pass, not in those of autocast.
    with torch.autocast(value.device.type, enabled=False):
        return torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)


def _in_order(
    needed: Sequence[bool], sums: Sequence[Tensor], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradient of every parameter, in its type; None where none is needed."""
    left = iter(sums)
    return [next(left).to(p) if need else None for p, need in zip(parameters, needed, strict=True)]
