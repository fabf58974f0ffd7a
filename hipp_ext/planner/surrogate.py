"""The surrogate: the scores of a plan, predicted from the evaluated plans.

It is a Gaussian process per objective over the fractions that the groups keep. A prediction takes
microseconds where an evaluation takes seconds, and comes with its uncertainty.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

# Hyperparameters are fitted when this many plans are known.
SCHEDULE = (1, 24, 36, 54, 81, 120, 180, 270, 400, 600)
MAX_TRAIN_PLANS = 800  # the latest ones: exact inference is cubic in their number
ITERATIONS = 30
MIN_FRACTION = 0.02  # of a group: smaller fractions are not distinguished
PRIOR_DEVIATION = 0.7  # of the log length scales around those that measured sensitivity suggests


class Surrogate:
    """Mean and standard deviation of each objective: `predict(fractions)`; `sample` draws jointly.

    Its inputs are -log(fraction) of every group, because removing a group's last units hurts more
    than removing its first. The kernel is a polynomial of degree two plus a Matern 5/2, both with
    one length scale per group. Length scales have a log-normal prior around those that measured
    sensitivity suggests: the more sensitive the group, the shorter.

    Args:
        curvature: (groups,) KL [nats] per squared fraction removed, see `Signals.curvature`.

    Source: Gaussian process regression with ARD, Rasmussen and Williams (2006), ch. 2 and 5.
    Learning from predicted rollouts between measured ones follows Dyna (Sutton 1991).
    """

    def __init__(self, curvature: Float[Tensor, " groups"]):
        root = curvature.double().clamp_min(1e-9).sqrt()
        # The root, half-way to equal scales in logs: KL only hints at these objectives.
        self._prior = -0.5 * (root / root.median()).log() + math.log(0.7)
        self._hyper: dict[int, Tensor] = {}
        self._fitted_on = 0

    @property
    def fitted(self) -> bool:
        """Whether it was fitted to any plan."""
        return self._fitted_on > 0

    def fit(
        self, fractions: Float[Tensor, "plans groups"], rewards: Float[Tensor, "plans objectives"]
    ) -> None:
        """Fit it to all evaluated plans, in the order of their evaluation."""
        fractions, rewards = fractions.double(), rewards.double()
        at = max(n for n in SCHEDULE if n <= max(len(fractions), 1))
        if at != self._fitted_on:
            seen = slice(0, max(at, 2))
            self._hyper = {
                k: self._maximise(_removed(fractions[seen]), _standardised(rewards[seen, k])[0])
                for k in range(rewards.shape[1])
            }
            self._fitted_on = at
        self._removed = _removed(fractions[-MAX_TRAIN_PLANS:])
        self._solved = []
        for k, hyper in self._hyper.items():
            y, mean, deviation = _standardised(rewards[-MAX_TRAIN_PLANS:, k])
            noise, *kernel = _split(hyper)
            root = _cholesky(_kernel(self._removed, self._removed, *kernel), noise)
            self._solved.append(
                (torch.cholesky_solve(y[:, None], root), root, kernel, mean, deviation)
            )

    def predict(
        self, fractions: Float[Tensor, "plans groups"]
    ) -> tuple[Float[Tensor, "plans objectives"], Float[Tensor, "plans objectives"]]:
        """Posterior mean and standard deviation of each objective, float32."""
        means, deviations = [], []
        for weights, root, kernel, mean, deviation in self._solved:
            removed = _removed(fractions)
            cross = _kernel(removed, self._removed, *kernel)
            spread = _diagonal(removed, *kernel) - torch.linalg.solve_triangular(
                root, cross.T, upper=False
            ).square().sum(0)
            means.append(mean + deviation * (cross @ weights)[:, 0])
            deviations.append(deviation * spread.clamp_min(1e-12).sqrt())
        return torch.stack(means, 1).float(), torch.stack(deviations, 1).float()

    def mean(self, fractions: Float[Tensor, "plans groups"]) -> Float[Tensor, "plans objectives"]:
        """Posterior mean of each objective, float32; cheaper than `predict`."""
        removed = _removed(fractions)
        means = [
            m + d * (_kernel(removed, self._removed, *kernel) @ weights)[:, 0]
            for weights, _, kernel, m, d in self._solved
        ]
        return torch.stack(means, 1).float()

    def sample(
        self, fractions: Float[Tensor, "plans groups"], draws: int, generator: torch.Generator
    ) -> Float[Tensor, "draws plans objectives"]:
        """Joint draws from the posterior."""
        drawn = []
        for weights, root, kernel, mean, deviation in self._solved:
            removed = _removed(fractions)
            cross = _kernel(removed, self._removed, *kernel)
            half = torch.linalg.solve_triangular(root, cross.T, upper=False)
            posterior = _cholesky(
                _kernel(removed, removed, *kernel) - half.T @ half, torch.tensor(1e-4)
            )
            noise = torch.randn(len(fractions), draws, generator=generator, dtype=torch.float64)
            drawn.append((mean + deviation * (cross @ weights + posterior @ noise)).T)
        return torch.stack(drawn, 2).float()

    def _maximise(self, removed: Tensor, y: Tensor) -> Tensor:
        """The most probable log hyperparameters: noise, scale of each kernel, length scales."""
        start = torch.cat([torch.tensor([-3.0, 0.0, -0.7], dtype=torch.float64), self._prior])
        if len(y) < SCHEDULE[1]:
            return start
        width = torch.tensor([1.5, 1.5, 1.5] + [PRIOR_DEVIATION] * len(self._prior))
        hyper = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([hyper], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            noise, *kernel = _split(hyper)
            root = _cholesky(_kernel(removed, removed, *kernel), noise)
            likelihood = (
                0.5 * torch.cholesky_solve(y[:, None], root)[:, 0] @ y + root.diagonal().log().sum()
            )
            prior = 0.5 * ((hyper - start) / width).square().sum()
            loss = likelihood + prior
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        return hyper.detach() if bool(hyper.detach().isfinite().all()) else start


def _removed(fractions: Tensor) -> Tensor:
    """The kernel's inputs: 0 for a whole group, growing as it shrinks."""
    return -fractions.double().clamp_min(MIN_FRACTION).log()


def _split(hyper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return hyper[0].exp(), hyper[1].exp(), hyper[2].exp(), hyper[3:].exp()


def _kernel(a: Tensor, b: Tensor, polynomial: Tensor, matern: Tensor, lengths: Tensor) -> Tensor:
    a, b = a / lengths, b / lengths
    inner = a @ b.T
    squared = (a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * inner).clamp_min(1e-12)
    distance = (5 * squared).sqrt()
    # It keeps the polynomial part near one for typical plans of any number of groups.
    scale = 1 + lengths.shape[0] / 4
    return (
        polynomial * ((1 + inner) / scale).square()
        + matern * (1 + distance + distance.square() / 3) * (-distance).exp()
    )


def _diagonal(a: Tensor, polynomial: Tensor, matern: Tensor, lengths: Tensor) -> Tensor:
    scale = 1 + lengths.shape[0] / 4
    return polynomial * ((1 + (a / lengths).square().sum(1)) / scale).square() + matern


def _cholesky(matrix: Tensor, noise: Tensor) -> Tensor:
    """Lower root of `matrix` + noise * I; the jitter grows until it exists."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    jitter = 1e-8
    while True:
        root, failed = torch.linalg.cholesky_ex(matrix + (noise + jitter) * eye)
        if not int(failed):
            return root
        jitter *= 10


def _standardised(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(standardised values, mean, deviation)."""
    mean = y.mean()
    deviation = y.std(unbiased=False).clamp_min(1e-6)
    return (y - mean) / deviation, mean, deviation
