"""MRS: module robustness sensitivity, how much the loss under attack depends on a group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hipp_ext.attacks import PGD, Ball, check_precision
from hipp_ext.calibration import Batch, Calibration, CalibrationLike
from hipp_ext.errors import AttackError, CalibrationError
from hipp_ext.groups import find_groups
from hipp_ext.modes import evaluating
from hipp_ext.quantities import take_numbers
from hipp_ext.scorers.base import Groups, Scorer, Scores, require_labels
from hipp_ext.scorers.gates import GatedGroup, Loss, gated_group, unit_taylor
from hipp_ext.scorers.group_loss import first_order, removal, worst_case
from hipp_ext.scorers.taylor import GRADIENT_PASSES, mean_loss

Form = Literal["removal", "worst", "grad"]
FORMS: tuple[Form, ...] = get_args(Form)
Attack = Callable[[nn.Module, Batch], Batch]  # (model, batch) -> the attacked batch


@dataclass(frozen=True, kw_only=True)
class MRS(Scorer):
    """A unit's part of its group's robustness sensitivity. Higher = keep, comparable across groups.

    `MRS().sensitivity(model, calibration)` returns one number per group, the rise of the loss on
    adversarial inputs, in one of three forms:

    - "removal" (default): the half of the group's units that robust Taylor ranks lowest is removed;
    - "worst": the weights that produce the units move by at most `rho` of their norm in the worst
      direction;
    - "grad": the same to first order, with one backward pass for all groups together.

    A unit's score is that number times the unit's robust Taylor score over the mean of its group.
    Robust Taylor is the derivative of the loss with respect to a gate on the unit, on adversarial
    inputs.

    The adversarial inputs are made once, on the model as it is, and stay fixed: by PGD on
    `pixel_values` where a batch has pictures, else on the token embeddings. The calibration needs
    `labels`; smaller batches give a finer average.

    Attributes:
        form: how the sensitivity is measured.
        epsilon: L-inf radius, as a fraction of the range of the batch's pixel_values, or of the
            root mean square of its embeddings.
        attack_steps: gradient steps of PGD; 0 scores the inputs as they are (the clean
            counterpart).
        attack: (model, batch) -> attacked batch, instead of PGD. `hipp_ext.robust.ImageAttack` uses
            a ball that is exact in pixels.
        rho: radius of "worst", as a fraction of a weight's norm; it also scales "grad".
        steps: gradient steps of "worst".
        ratio: fraction of the units that "removal" removes.
        seed: random seed of PGD's starting point.

    Raises:
        CalibrationError: an unknown form, or, when called, a batch has no labels.
        AttackError: epsilon or rho is not above zero, attack_steps is negative, steps is below one,
            or ratio is not above zero and at most one.
        UnsupportedModelError (when called): the model is in half precision and to be attacked; an
            attack would be lost in its rounding.

    Source: MRPF (arXiv 2410.15176), abstract: a module's sensitivity to adversarial perturbations
    decides how much of it is pruned.
    Differs from the paper: its formula, attack and map to ratios are not public, so all three forms
    are ours. "worst" follows module robust criticality (arXiv 2308.02533); "removal" measures what
    pruning does, and was the best of them in our trials (evals/studies/LOG.md).
    """

    form: str = "removal"  # one of FORMS
    epsilon: float = 8 / 255
    attack_steps: int = 10
    attack: Attack | None = None
    rho: float = 0.1
    steps: int = 10
    ratio: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise CalibrationError(f"MRS has the forms {', '.join(FORMS)}; got {self.form!r}.")
        Ball(epsilon=self.epsilon)
        take_numbers(
            self, AttackError, wholes=("attack_steps", "steps", "seed"), finites=("rho", "ratio")
        )
        check_numbers(self.rho, self.ratio, self.steps, self.attack_steps)

    def sensitivity(
        self,
        model: nn.Module,
        calibration: CalibrationLike | None = None,
        *,
        processor: Any = None,
        groups: Groups | None = None,
    ) -> dict[str, float]:
        """Group name -> sensitivity [nats]; arguments and errors as for a call."""
        groups = tuple(groups) if groups is not None else find_groups(model)
        batches = Calibration.of(model, calibration, processor).batches
        with evaluating(model):
            values, _ = self._measure(model, groups, batches)
        return {g.name: v for g, v in zip(groups, values, strict=True)}

    def passes(self, groups: Groups) -> float:
        """By the number of groups, which are removed, or moved, one after the other."""
        of_form = {
            "removal": 1.0 + len(groups),
            "worst": GRADIENT_PASSES * self.steps * len(groups),
            "grad": GRADIENT_PASSES,
        }
        return GRADIENT_PASSES * (self.attack_steps + 1) + of_form[self.form]

    def score(self, model: nn.Module, groups: Groups, batches: Sequence[Batch]) -> Scores:
        values, units = self._measure(model, groups, batches)
        return {g.name: unit_shares(v, u) for g, v, u in zip(groups, values, units, strict=True)}

    def _measure(
        self, model: nn.Module, groups: Groups, batches: Sequence[Batch]
    ) -> tuple[list[float], list[Tensor]]:
        require_labels(batches, "MRS needs a loss")
        if self.attack is not None or self.attack_steps:
            check_precision(model)
        return measure(
            model,
            [gated_group(g) for g in groups],
            mean_loss,
            [self._attacked(model, batch) for batch in batches],
            self.form,
            rho=self.rho,
            steps=self.steps,
            ratio=self.ratio,
        )

    def _attacked(self, model: nn.Module, batch: Batch) -> Batch:
        if self.attack is not None:
            return self.attack(model, batch)
        if not self.attack_steps:
            return batch
        device = next(model.parameters()).device
        pixels = batch.get("pixel_values")
        if pixels is not None:
            name, x = "pixel_values", pixels.to(device)
            low, high = float(x.min()), float(x.max())
            ball = Ball(epsilon=self.epsilon * (high - low), low=low, high=high)
            batch = dict(batch)
        else:
            x = model.get_input_embeddings()(batch["input_ids"].to(device)).detach()  # type: ignore[operator]
            name, size = "inputs_embeds", float(x.float().square().mean().sqrt())
            ball = Ball(epsilon=self.epsilon * size, low=-torch.inf, high=torch.inf)
            batch = {k: v for k, v in batch.items() if k != "input_ids"}
        pgd = PGD(ball=ball, steps=self.attack_steps, seed=self.seed)
        return batch | {name: pgd(lambda b, moved: mean_loss(model, {**b, name: moved}), batch, x)}


def measure(
    model: nn.Module,
    groups: Sequence[GatedGroup],
    loss: Loss,
    batches: Sequence[Any],
    form: str,
    *,
    rho: float = 0.1,
    steps: int = 10,
    ratio: float = 0.5,
) -> tuple[list[float], list[Tensor]]:
    """(sensitivity per group, Taylor scores per group and unit) of `loss` on `batches`."""
    units = unit_taylor(model, groups, loss, batches)
    if form == "worst":
        return worst_case(model, groups, loss, batches, rho=rho, steps=steps), units
    if form == "grad":
        return first_order(model, groups, loss, batches, rho=rho), units
    return removal(model, groups, loss, batches, units, ratio=ratio), units


def check_numbers(rho: float, ratio: float, steps: int, attack_steps: int) -> None:
    """Raise AttackError unless MRS can be measured with these."""
    if not (0 < rho < float("inf") and 0 < ratio <= 1 and steps >= 1 and attack_steps >= 0):
        raise AttackError(
            "MRS needs rho above zero, ratio above zero and at most one, steps >= 1 and "
            f"attack_steps >= 0; got {rho=}, {ratio=}, {steps=} and {attack_steps=}."
        )


def unit_shares(sensitivity: float, units: Tensor) -> Tensor:
    """Scores of a group's units: in proportion to `units`, and `sensitivity` on average."""
    mean = units.double().mean()
    if float(mean) == 0:
        return torch.zeros_like(units, dtype=torch.float64)
    return sensitivity * units.double() / mean
