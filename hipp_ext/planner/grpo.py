"""Plan-level GRPO: rollouts are whole plans, compared with other rollouts for the same preference.

What differs from GRPO as published for text (arXiv 2402.03300), and why:
1. One action per episode, a Gaussian over a budget and one logit per group; so there is no token-level ratio.
2. One on-policy update per step: the ratio is 1, and clipping and a KL penalty have nothing to do.
3. Two baselines, because the action has two parts: an allocation is compared with others for the same preference and
   budget, a budget with the other budgets for the same preference.
4. Allocation advantages are normalised per objective and weighted by the preference afterwards (GDPO, arXiv 2601.05242),
   with a floor: an objective that is constant within the comparison, as compression is, carries noise and counts as zero.
5. Budget advantages come from a scalarisation of absolute objectives: z-scores of opposed objectives would cancel.
6. The final advantage is not divided by its standard deviation again (Dr. GRPO, arXiv 2503.20783).
7. Hindsight: evaluations are the cost, so all archived plans are re-used for other preferences by weighted regression.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from hipp_ext.budget import Bounds, keep_counts, max_ratio
from hipp_ext.errors import CheckpointError
from hipp_ext.files import write_atomic
from hipp_ext.planner.archive import Archive, Record
from hipp_ext.planner.policy import MAX_RATIO, Policy
from hipp_ext.planner.reward import STABILITY_WEIGHT, Reward, Scalarisation, scalarise
from hipp_ext.planner.state import Signals

CHECKPOINT, ARCHIVE, IDENTITY = "checkpoint.safetensors", "archive.jsonl", "fit.json"
NOISE_FLOOR = 1e-3  # an objective that varies less than this within a comparison does not count
BUDGET_WEIGHT = 0.05  # of the budget's policy gradient beside its regression: alone it overshoots into saturation
TEMPERATURE = 0.01  # hindsight: plans whose merit differs by this much differ by a factor e in weight


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How to fit; `evaluations` plans are evaluated in all, fewer where two rollouts round to the same plan.

    Attributes:
        steps: policy updates.
        preferences: preferences per step, drawn over the whole simplex.
        budgets: budgets per preference (1 where pruning_ratio is fixed).
        rollouts: allocations per preference and budget, at least 2.
        learning_rate: of Adam.
        noise: standard deviation of the allocation logits at the first and at the last step.
        budget_noise: standard deviation of the budget logit.
        hindsight: regression updates on the archive per step.
        scalarisation: of the objectives, for budgets and hindsight.
        seed: of preferences, noise and policy. The same seed gives the same archive.
    """

    steps: int = 20
    preferences: int = 2
    budgets: int = 2
    rollouts: int = 3
    learning_rate: float = 3e-3
    noise: tuple[float, float] = (0.7, 0.3)
    budget_noise: float = 0.5
    hindsight: int = 8
    scalarisation: Scalarisation = "tchebycheff"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or min(self.preferences, self.budgets) < 1 or self.rollouts < 2:
            raise ValueError(f"steps >= 0, preferences and budgets >= 1 and rollouts >= 2 are needed: {self}")

    @property
    def evaluations(self) -> int:
        """Plans evaluated by a full fit."""
        return self.steps * self.preferences * self.budgets * self.rollouts


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a fit did.

    Attributes:
        steps: policy updates in all, those of earlier, interrupted runs included.
        evaluations: plans in the archive.
        hypervolume: of the archive's front, see `archive.REFERENCE_POINT`.
        history: hypervolume after every step of this run.
        folder: where checkpoint and archive lie, or None.
    """

    steps: int
    evaluations: int
    hypervolume: float
    history: tuple[float, ...]
    folder: Path | None


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The plans of one step; P preferences, M budgets, N allocations, G groups."""

    preferences: Float[Tensor, "P 3"]
    budgets: Float[Tensor, "P M"]
    ratios: Float[Tensor, "P M"]
    allocations: Float[Tensor, "P M N G"]


class Trainer:
    """Fits a policy to what `measure` says of plans; resumes from `folder`."""

    def __init__(
        self,
        policy: Policy,
        signals: Signals,
        measure: Callable[[tuple[int, ...]], Reward],
        settings: FitSettings,
        *,
        pruning_ratio: float | None = None,
        bounds: Bounds | None = None,
        folder: Path | None = None,
        dense: Mapping[str, float] | None = None,
    ):
        self.policy, self.signals, self.measure, self.settings = policy, signals, measure, settings
        self.pruning_ratio, self.bounds, self.folder = pruning_ratio, bounds or Bounds(), folder
        self.dense = {name: round(value, 3) for name, value in (dense or {}).items()}
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate)
        self.archive = Archive(folder / ARCHIVE if folder else None)
        self.step = self._resume()
        self._known: dict[tuple[int, ...], Reward] = {r.keeps: r.reward for r in self.archive.records}
        # What was evaluated after the last checkpoint is not evaluated again, only replayed.
        self._known.update({r.keeps: r.reward for r in self.archive.keep_steps_before(self.step)})

    def run_step(self, tick: Callable[[], None] = lambda: None) -> None:
        """Draw plans, evaluate them, update the policy, write archive and checkpoint. `tick` is called per plan."""
        # A generator per step: a resumed run draws what the undisturbed one would have drawn.
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
        rollouts = self._draw(generator)
        records = self._evaluate(rollouts, tick)
        rewards = torch.tensor([dataclasses.astuple(r.reward) for r in records])
        rewards = rewards.view(*rollouts.allocations.shape[:3], 4)
        with torch.enable_grad():  # whatever the caller, or a library it imported, has switched off
            self._update(self._policy_loss(rollouts, rewards))
            for _ in range(self.settings.hindsight):
                self._update(self._hindsight_loss(generator))
        self.step += 1
        self._save()

    def _draw(self, generator: torch.Generator) -> Rollouts:
        s = self.settings
        preferences = draw_preferences(s.preferences, self.step, generator)
        budgets = 1 if self.pruning_ratio is not None else s.budgets
        with torch.no_grad():
            logits = self.policy.budget(self.signals, preferences)[:, None] + s.budget_noise * torch.randn(
                s.preferences, budgets, generator=generator
            )
            limit = max(0.0, max_ratio(self.signals.groups, self.bounds) - 1e-6)
            if self.pruning_ratio is None:
                ratios = (MAX_RATIO * torch.sigmoid(logits)).clamp(max=limit)
            else:
                ratios = torch.full_like(logits, self.pruning_ratio)
            means = self._allocation_means(preferences, ratios)
            noise = torch.randn(*means.shape[:2], s.rollouts, means.shape[2], generator=generator)
        return Rollouts(
            preferences=preferences,
            budgets=logits,
            ratios=ratios,
            allocations=means[:, :, None] + self._noise() * noise,
        )

    def _noise(self) -> float:
        first, last = self.settings.noise
        return first + (last - first) * self.step / max(self.settings.steps - 1, 1)

    def _allocation_means(self, preferences: Tensor, ratios: Tensor) -> Float[Tensor, "P M G"]:
        flat = preferences.repeat_interleave(ratios.shape[1], 0)
        return self.policy.allocation(self.signals, flat, ratios.flatten()).view(*ratios.shape, -1)

    def _evaluate(self, rollouts: Rollouts, tick: Callable[[], None]) -> list[Record]:
        records = []
        shape = rollouts.allocations.shape[:3]
        for index in range(math.prod(shape)):
            p, m, n = index // (shape[1] * shape[2]), index // shape[2] % shape[1], index % shape[2]
            allocation, ratio = rollouts.allocations[p, m, n].tolist(), float(rollouts.ratios[p, m])
            keeps = keep_counts(self.signals.groups, allocation, ratio, self.bounds)
            if keeps not in self._known:
                self._known[keeps] = self.measure(keeps)
            preference: Any = tuple(rollouts.preferences[p].tolist())
            records.append(Record(step=self.step, index=index, preference=preference, pruning_ratio=ratio,
                                  allocation=tuple(allocation), keeps=keeps, reward=self._known[keeps]))  # fmt: skip
            self.archive.append(records[-1:])
            tick()
        return records

    def _policy_loss(self, rollouts: Rollouts, rewards: Float[Tensor, "P M N 4"]) -> Tensor:
        s, preferences = self.settings, rollouts.preferences
        means = self._allocation_means(preferences, rollouts.ratios)[:, :, None]
        log_likelihood = -((rollouts.allocations - means) ** 2).mean(-1) / (2 * self._noise() ** 2)
        loss = -(allocation_advantages(rewards, preferences) * log_likelihood).mean()
        if self.pruning_ratio is None and s.budgets > 1:
            mean = self.policy.budget(self.signals, preferences)[:, None]
            log_likelihood = -((rollouts.budgets - mean) ** 2) / (2 * s.budget_noise**2)
            loss = loss - BUDGET_WEIGHT * (budget_advantages(rewards, preferences, s.scalarisation) * log_likelihood).mean()
        return loss

    def _hindsight_loss(self, generator: torch.Generator, draws: int = 16, window: float = 0.08) -> Tensor:
        """Move towards the archived plans that serve a preference best among those of about the same budget."""
        records = self.archive.records
        ratios = torch.tensor([r.reward.compression for r in records])
        gains = torch.tensor([[r.reward.utility, r.reward.robustness] for r in records])
        taken = torch.tensor([r.allocation for r in records])
        preferences = draw_preferences(draws, 0, generator)
        centres = ratios[torch.randint(len(records), (draws,), generator=generator)]
        near = (ratios[None] - centres[:, None]).abs() <= window
        weights = preferences[:, :2] / preferences[:, :2].sum(1, keepdim=True).clamp_min(1e-6)
        # Less pruning is always easier: what remains after the trend over the window is the merit of the allocation.
        merit = _detrend(weights @ gains.T, ratios[None].expand(draws, -1), near)
        share = torch.softmax((merit / TEMPERATURE).masked_fill(~near, -torch.inf), 1)
        wanted = share @ taken
        wanted = wanted - wanted.mean(1, keepdim=True)
        mean = self.policy.allocation(self.signals, preferences, centres)
        loss = 0.1 * ((mean - mean.mean(1, keepdim=True) - wanted) ** 2).mean()
        if self.pruning_ratio is not None:
            return loss
        objectives = torch.cat([gains, ratios[:, None]], 1).expand(draws, -1, -1)
        value = scalarise(objectives, preferences[:, None].expand_as(objectives), self.settings.scalarisation)
        taken_budgets = torch.logit((ratios / MAX_RATIO).clamp(0.01, 0.99))
        target = torch.softmax(value / TEMPERATURE, 1) @ taken_budgets
        return loss + ((self.policy.budget(self.signals, preferences) - target) ** 2).mean()

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()

    def _save(self) -> None:
        if self.folder is None:
            return
        tensors = {f"policy.{k}": v for k, v in self.policy.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": v for k, v in moments.items()}
        metadata = {"step": str(self.step)}
        write_atomic(
            self.folder / CHECKPOINT, safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, metadata)
        )

    def _identity(self) -> str:
        """What must be the same for a run to be resumed; more steps may be asked for later."""
        settings = {k: v for k, v in dataclasses.asdict(self.settings).items() if k != "steps"}
        measured = {"scorer": self.signals.scorer, "model": self.signals.digest, "calibration": self.signals.calibration}
        identity = {"settings": settings, "pruning_ratio": self.pruning_ratio, "bounds": dataclasses.asdict(self.bounds)}
        # What the evaluator says of the dense model stands for its questions.
        return json.dumps(identity | measured | {"dense": self.dense}, sort_keys=True)

    def _check_identity(self, path: Path) -> None:
        if not path.exists():
            write_atomic(path, self._identity() + "\n")
        elif (there := path.read_text().strip()) != self._identity():
            raise CheckpointError(
                f"{path.parent} holds a fit with other settings, of another model, with another evaluator or on other "
                f"calibration. Choose another folder, or remove it.\n there: {there}\n now:   {self._identity()}"
            )

    def _resume(self) -> int:
        if self.folder is None:
            return 0
        self._check_identity(self.folder / IDENTITY)
        path = self.folder / CHECKPOINT
        if not path.exists():
            return 0
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata: Mapping[str, str] = file.metadata()
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
            step = int(metadata["step"])
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}. Remove {self.folder} to start again.") from None
        self.policy.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("policy.")})
        state = self.optimizer.state_dict()
        state["state"] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, index, name = key.split(".")
                state["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(state)
        return step


def draw_preferences(n: int, step: int, generator: torch.Generator) -> Float[Tensor, "n 3"]:
    """`n` points on the simplex: uniform (Dirichlet(1)); every fourth step, the first one is a corner, in turn."""
    drawn = -torch.rand(n, 3, generator=generator).clamp_min(1e-9).log()
    drawn = drawn / drawn.sum(1, keepdim=True)
    if step % 4 == 3:
        corner = torch.eye(3)[step // 4 % 3] + 0.05
        drawn[0] = corner / corner.sum()
    return drawn


def allocation_advantages(rewards: Float[Tensor, "P M N 4"], preferences: Float[Tensor, "P 3"]) -> Float[Tensor, "P M N"]:
    """Advantage of each allocation over the others for the same preference and budget.

    Per objective: (reward - mean) / max(standard deviation, noise floor), zero where the deviation is below the floor;
    then weighted by the preference. Stability enters with a small fixed weight.
    """
    centred = rewards - rewards.mean(2, keepdim=True)
    deviation = rewards.std(2, unbiased=False, keepdim=True)
    normalised = torch.where(deviation > NOISE_FLOOR, centred / deviation.clamp_min(NOISE_FLOOR), 0.0)
    stability = torch.full((len(preferences), 1), STABILITY_WEIGHT)
    weights = torch.cat([preferences[:, :2], torch.zeros_like(stability), stability], 1)
    return (normalised * weights[:, None, None]).sum(-1)


def budget_advantages(
    rewards: Float[Tensor, "P M N 4"], preferences: Float[Tensor, "P 3"], kind: Scalarisation
) -> Float[Tensor, "P M"]:
    """Advantage of each budget over the others for the same preference: scalarised means over its allocations."""
    value = scalarise(rewards.mean(2)[..., :3], preferences[:, None].expand(-1, rewards.shape[1], -1), kind)
    centred = value - value.mean(1, keepdim=True)
    deviation = value.std(1, unbiased=False, keepdim=True)
    return torch.where(deviation > NOISE_FLOOR, centred / deviation.clamp_min(NOISE_FLOOR), 0.0)


def _detrend(values: Tensor, x: Tensor, member: Tensor) -> Tensor:
    """Residuals of a line through each row's members."""
    m = member.double()
    count = m.sum(1, keepdim=True)
    dx = x - (m * x).sum(1, keepdim=True) / count
    dy = values - (m * values).sum(1, keepdim=True) / count
    slope = (m * dx * dy).sum(1, keepdim=True) / (m * dx * dx).sum(1, keepdim=True).clamp_min(1e-12)
    return (dy - slope * dx).float()
