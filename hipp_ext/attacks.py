"""Attacks on one tensor of a batch; prompts, masks and labels stay with their rows.

Libraries of attacks take `model(images) -> logits` and select rows of the images, so they cannot
handle prompts that differ between rows, yes/no answers, or losses over generated tokens. Here the
loss is any function of the batch and of the perturbed tensor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.errors import AttackError, UnsupportedModelError
from hipp_ext.quantities import take_numbers

# (batch, perturbed tensor) -> loss per row, or one loss; the attack raises it
LossFn = Callable[[Any, Tensor], Tensor]
MOMENTUM = 0.75
MIN_INCREASES = 0.75  # fraction of steps that must raise the loss; otherwise the step is halved


@dataclass(frozen=True, kw_only=True, eq=False)
class Ball:
    """All tensors within `epsilon` per entry of a given one, and within [low, high].

    Attributes:
        epsilon: radius; a number, or a tensor that broadcasts against the perturbed one, with one
            value per colour channel for example.
        low: least valid value, as `epsilon`.
        high: largest valid value, as `epsilon`.

    Raises:
        AttackError: `epsilon` is not above zero and finite, or the range is empty.
    """

    epsilon: float | Tensor
    low: float | Tensor = 0.0
    high: float | Tensor = 1.0

    def __post_init__(self) -> None:
        for name in ("epsilon", "low", "high"):
            if isinstance(value := getattr(self, name), str | bytes | bool | None):
                raise AttackError(f"{name}={value!r}: a number is needed, or a tensor of numbers.")
        epsilon, low, high = (
            torch.as_tensor(v, dtype=torch.float64) for v in (self.epsilon, self.low, self.high)
        )
        if not bool((torch.isfinite(epsilon) & (epsilon > 0)).all()):
            raise AttackError(
                f"epsilon must be above zero and finite, got {epsilon.tolist()}. For clean inputs, "
                "run no attack."
            )
        if not bool((low < high).all()):
            raise AttackError(
                f"The range of valid values must not be empty, got [{low.tolist()}, "
                f"{high.tolist()}]."
            )

    def on(self, x: Tensor) -> "Ball":
        """The same ball in `x`'s dtype and on its device."""
        epsilon, low, high = (
            torch.as_tensor(v, dtype=x.dtype, device=x.device)
            for v in (self.epsilon, self.low, self.high)
        )
        return Ball(epsilon=epsilon, low=low, high=high)

    def check(self, x: Tensor) -> None:
        """Raise AttackError unless `x` is floating point, finite and within the range."""
        if not x.is_floating_point():
            raise AttackError(
                f"The perturbed tensor must be floating point, got {x.dtype}; divide bytes by 255."
            )
        if x.dtype in (torch.float16, torch.bfloat16):
            raise AttackError(
                f"The perturbed tensor is {x.dtype}: steps of an attack are lost in its rounding, "
                "and the result would look robust. Attack in float32: model.float()."
            )
        ball = self.on(x)
        slack = 1e-4 * (ball.high - ball.low)  # type: ignore[operator]
        if not bool(((x >= ball.low - slack) & (x <= ball.high + slack)).all()):  # also catches NaN
            raise AttackError(
                f"Values must lie in [{_span(ball.low)}, {_span(ball.high)}], got "
                f"{float(x.min()):.4g} to {float(x.max()):.4g}. Pass images as they are before "
                "normalisation, and put the normalisation into the model."
            )

    def project(self, moved: Tensor, x: Tensor) -> Tensor:
        """The point of the ball around `x` nearest to `moved`; the ball must be `on(x)`."""
        moved = torch.minimum(torch.maximum(moved, x - self.epsilon), x + self.epsilon)  # type: ignore[operator]
        return torch.minimum(
            torch.maximum(moved, torch.as_tensor(self.low)), torch.as_tensor(self.high)
        )

    def random(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A uniform draw around `x`, cut to the range."""
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        return self.project(x + self.epsilon * (2 * noise - 1), x)


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Projected gradient ascent by the gradient's sign: `pgd(loss_fn, batch, x)` -> perturbed x.

    Attributes:
        ball: ball around `x` that holds the result.
        steps: number of gradient steps.
        step_size: size of a step, in multiples of epsilon; None: 2.5 / steps.
        random_start: start at a random point of the ball instead of at `x`.
        seed: random seed of the starting point; the global random state is neither read nor
            changed.

    Raises:
        AttackError: see `Ball`; `steps` is below one; or the loss is not finite.

    Source: Madry et al. (arXiv 1706.06083), section 2.1.
    """

    ball: Ball
    steps: int = 10
    step_size: float | None = None
    random_start: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _check_steps(self)
        if self.step_size is not None:
            take_numbers(self, AttackError, finites=("step_size",))

    def __call__(self, loss_fn: LossFn, batch: Any, x: Tensor) -> Tensor:
        x, ball, moved = _start(self, x)
        step = (2.5 / self.steps if self.step_size is None else self.step_size) * ball.epsilon  # type: ignore[operator]
        for _ in range(self.steps):
            _, gradient = loss_and_gradient(loss_fn, batch, moved)
            moved = ball.project(moved + step * gradient.sign(), x)
        return moved


@dataclass(frozen=True, kw_only=True)
class APGD:
    """Auto-PGD: PGD with momentum, and with step sizes that are halved where progress stalls.

    It returns the best point of each row; `loss_fn` must give one loss per row.

    Attributes:
        ball: ball around `x` that holds the result.
        steps: number of gradient steps.
        random_start: start at a random point of the ball instead of at `x`.
        seed: random seed of the starting point.

    Source: Croce & Hein (arXiv 2003.01690), algorithm 1.
    Differs from the paper: `steps` gradients in all, the one at the start included.
    """

    ball: Ball
    steps: int = 100
    random_start: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _check_steps(self)

    def __call__(self, loss_fn: LossFn, batch: Any, x: Tensor) -> Tensor:
        x, ball, moved = _start(self, x)
        loss, gradient = loss_and_gradient(loss_fn, batch, moved)
        if loss.shape != x.shape[:1]:
            raise AttackError(
                f"APGD needs one loss per row, {x.shape[0]} of them; the loss has shape "
                f"{tuple(loss.shape)}."
            )
        state = _Ascent(moved, loss, gradient)
        previous, checks = moved, checkpoints(self.steps)
        for i in range(1, self.steps + 1):
            size = _rows(state.step, x) * ball.epsilon
            ahead = ball.project(moved + size * gradient.sign(), x)
            share = MOMENTUM if i > 1 else 1.0
            ahead = ball.project(
                moved + share * (ahead - moved) + (1 - share) * (moved - previous), x
            )
            previous, moved, before = moved, ahead, loss
            loss, gradient = loss_and_gradient(loss_fn, batch, moved)
            state.update(moved, loss, gradient, loss > before)
            if i in checks:
                halved = state.check()
                moved = torch.where(_rows(halved, x), state.best, moved)
                gradient = torch.where(_rows(halved, x), state.best_gradient, gradient)
                loss = torch.where(halved, state.best_loss, loss)
        return state.best


class _Ascent:
    """State of APGD per row."""

    def __init__(self, moved: Tensor, loss: Tensor, gradient: Tensor):
        self.best, self.best_loss, self.best_gradient = moved, loss, gradient
        self.step = torch.full_like(loss, 2.0)  # in multiples of epsilon
        self.increases, self.since = torch.zeros_like(loss), 0
        self.halved_last = torch.zeros_like(loss, dtype=torch.bool)
        self.loss_last = torch.full_like(loss, -torch.inf)

    def update(self, moved: Tensor, loss: Tensor, gradient: Tensor, increased: Tensor) -> None:
        better = loss > self.best_loss
        self.best = torch.where(_rows(better, moved), moved, self.best)
        self.best_gradient = torch.where(_rows(better, moved), gradient, self.best_gradient)
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.increases, self.since = self.increases + increased, self.since + 1

    def check(self) -> Tensor:
        """Halve the step of rows that oscillate or have stalled; returns which ones."""
        halve = self.increases < MIN_INCREASES * self.since
        halve |= ~self.halved_last & (self.best_loss <= self.loss_last)
        self.step = torch.where(halve, self.step / 2, self.step)
        self.increases, self.since = torch.zeros_like(self.increases), 0
        self.halved_last, self.loss_last = halve, self.best_loss
        return halve


def checkpoints(steps: int) -> frozenset[int]:
    """Steps after which APGD checks progress: at 22%, then at intervals that shrink by 3% to 6%."""
    before, share, result = 0.0, 0.22, set()
    while share < 1:
        result.add(math.ceil(share * steps - 1e-9))
        before, share = share, share + max(share - before - 0.03, 0.06)
    return frozenset(result)


def loss_and_gradient(loss_fn: LossFn, batch: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(loss per row or one loss, gradient of their sum at `x`), detached; weights get no gradients.

    Raises:
        AttackError: the loss is not finite, or does not depend on `x`.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        loss = loss_fn(batch, x)
        if not torch.isfinite(loss).all():
            raise AttackError(
                "The loss under attack is NaN or infinite; an attack cannot climb it."
            )
        (gradient,) = (
            torch.autograd.grad(loss.sum(), x, allow_unused=True) if loss.requires_grad else (None,)
        )
    if gradient is None:
        raise AttackError(
            "The loss does not depend on the perturbed tensor; it may be detached, or computed "
            "without gradients."
        )
    return loss.detach(), gradient


def _start(attack: PGD | APGD, x: Tensor) -> tuple[Tensor, Ball, Tensor]:
    """(x, the ball in its dtype and on its device, the point where the attack starts)."""
    x = x.detach()
    attack.ball.check(x)
    ball = attack.ball.on(x)
    generator = torch.Generator().manual_seed(attack.seed)
    return x, ball, ball.random(x, generator) if attack.random_start else x


def _check_steps(attack: PGD | APGD) -> None:
    take_numbers(attack, AttackError, wholes=("steps", "seed"))
    if attack.steps < 1:
        raise AttackError(f"An attack takes at least one step, got steps={attack.steps}.")


def _rows(values: Tensor, x: Tensor) -> Tensor:
    """One value per row, shaped to broadcast over the rest of `x`."""
    return values.view(-1, *[1] * (x.dim() - 1))


def _span(value: float | Tensor) -> str:
    values = torch.as_tensor(value).flatten()
    return f"{float(values[0]):.4g}" + (", ..." if len(values) > 1 else "")


def check_precision(model: nn.Module) -> None:
    """Raise UnsupportedModelError for a model in half precision, whose rounding hides attacks."""
    half = sorted(
        {str(p.dtype) for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
    )
    if half:
        raise UnsupportedModelError(
            f"This {type(model).__name__} has weights in {', '.join(half)}: gradients of attacks "
            "vanish in its rounding, and it would look robust. Use model.float()."
        )
