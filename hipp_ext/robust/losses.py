"""Adversarial training losses: `loss(model, images, labels, seed)` -> mean loss under attack.

Any function of this signature is a loss for `hipp_ext.robust`. The inner attack runs in eval mode,
the outer passes run in the model's own mode.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hipp_ext.attacks import PGD, Ball, check_precision
from hipp_ext.errors import AttackError
from hipp_ext.modes import evaluating
from hipp_ext.quantities import take_numbers

AdversarialLoss = Callable[[nn.Module, Tensor, Tensor, int], Float[Tensor, ""]]


@dataclass(frozen=True, kw_only=True)
class _Attacked:
    """A loss on attacked images; its attributes are those of every loss here."""

    epsilon: float = 8 / 255
    steps: int = 10

    def __post_init__(self) -> None:
        betas = tuple(name for name in ("beta",) if hasattr(self, name))
        take_numbers(self, AttackError, wholes=("steps",), finites=betas)
        PGD(ball=Ball(epsilon=self.epsilon), steps=self.steps)


@dataclass(frozen=True, kw_only=True)
class PGDAT(_Attacked):
    """Cross-entropy on PGD's images.

    Attributes:
        epsilon: L-inf radius, in units of images in [0, 1].
        steps: gradient steps of PGD, each 2.5 epsilon / steps wide, from a random start.

    Raises:
        AttackError: epsilon is not above zero, or steps is below one.
        UnsupportedModelError (when called): the model is in half precision.

    Source: Madry et al. (arXiv 1706.06083), eq. 2.1.
    """

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        return F.cross_entropy(
            model(attacked(model, images, labels, self.epsilon, self.steps, seed)), labels
        )


@dataclass(frozen=True, kw_only=True)
class TRADES(_Attacked):
    """Cross-entropy on clean images plus `beta` times the divergence between clean and attacked.

    Attributes:
        epsilon: L-inf radius, in units of images in [0, 1].
        steps: gradient steps of the inner attack, which raises the divergence.
        beta: weight of the divergence.

    Source: Zhang et al. (arXiv 1901.08573), eq. 5.
    """

    beta: float = 6.0

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        check_precision(model)
        pgd = PGD(ball=Ball(epsilon=self.epsilon), steps=self.steps, seed=seed)
        with evaluating(model):
            with torch.no_grad():
                clean = model(images).softmax(1)
            moved = pgd(
                lambda target, x: F.kl_div(model(x).log_softmax(1), target, reduction="sum"),
                clean,
                images,
            )
        logits = model(images)
        divergence = F.kl_div(model(moved).log_softmax(1), logits.softmax(1), reduction="batchmean")
        return F.cross_entropy(logits, labels) + self.beta * divergence


@dataclass(frozen=True, kw_only=True)
class MART(_Attacked):
    """Boosted cross-entropy on PGD's images plus a divergence, weighted by the clean uncertainty.

    Attributes:
        epsilon: L-inf radius, in units of images in [0, 1].
        steps: gradient steps of PGD.
        beta: weight of the divergence (lambda in the paper).

    Source: Wang et al. (ICLR 2020, openreview rklOg6EFwS), eq. 11.
    """

    beta: float = 5.0

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        check_precision(model)
        clean = model(images)
        moved = model(attacked(model, images, labels, self.epsilon, self.steps, seed))
        p_clean, p_moved = clean.softmax(1), moved.softmax(1)
        label = F.one_hot(labels, clean.shape[1]).bool()
        runner_up = p_moved.masked_fill(label, 0).amax(1)
        boost = torch.log1p(-runner_up.clamp_max(1 - 1e-6)).mean()
        per_row = F.kl_div(moved.log_softmax(1), p_clean, reduction="none").sum(1)
        return (
            F.cross_entropy(moved, labels)
            - boost
            + self.beta * (per_row * (1 - p_clean[label])).mean()
        )


@dataclass(frozen=True, kw_only=True)
class AWP:
    """Another adversarial loss, with its gradient taken at weights that were moved to raise it.

    Attributes:
        base: the loss; called once to find the direction and once at the moved weights.
        gamma: how far a weight tensor moves, as a fraction of its norm. Biases and norms stay.

    Source: Wu et al. (arXiv 2004.05884), section 4.
    Differs from the paper: the direction is the gradient normalised per tensor, one step, without a
    proxy optimizer.
    """

    base: AdversarialLoss
    gamma: float = 0.005

    def __post_init__(self) -> None:
        take_numbers(self, AttackError, finites=("gamma",))
        if not 0 < self.gamma < 1:
            raise AttackError(
                f"AWP's gamma is a fraction of the weights' norm between 0 and 1, got {self.gamma}."
            )

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        return self.base(model, images, labels, seed)

    @contextlib.contextmanager
    def moved(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Iterator[None]:
        """Inside the block the weights are moved; afterwards they are restored, to the bit."""
        weights = [p for p in model.parameters() if p.dim() > 1 and p.requires_grad]
        statistics = {n: b.clone() for n, b in model.named_buffers()}
        gradients = torch.autograd.grad(
            self.base(model, images, labels, seed), weights, allow_unused=True
        )
        original = [p.detach().clone() for p in weights]
        with torch.no_grad():
            for n, b in model.named_buffers():
                b.copy_(statistics[n])  # as before the search for the direction
            for p, g in zip(weights, gradients, strict=True):
                if g is not None:
                    p.add_(self.gamma * p.norm() * g / g.norm().clamp_min(1e-12))
        try:
            yield
        finally:
            with torch.no_grad():
                for p, old in zip(weights, original, strict=True):
                    p.copy_(old)


def backward(
    loss: AdversarialLoss, model: nn.Module, images: Tensor, labels: Tensor, seed: int
) -> float:
    """Add the loss's gradients to `.grad`; returns the loss."""
    step = (model, images, labels, seed)
    with loss.moved(*step) if isinstance(loss, AWP) else contextlib.nullcontext():
        value = loss(*step)
        value.backward()
    return float(value.detach())


def attacked(
    model: nn.Module,
    images: Tensor,
    labels: Int[Tensor, " rows"],
    epsilon: float,
    steps: int,
    seed: int,
) -> Tensor:
    """PGD's images on the cross-entropy, made in eval mode."""
    check_precision(model)
    pgd = PGD(ball=Ball(epsilon=epsilon), steps=steps, seed=seed)
    with evaluating(model):
        return pgd(lambda y, x: F.cross_entropy(model(x), y, reduction="none"), labels, images)
