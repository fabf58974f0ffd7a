"""MRS: module robustness sensitivity, how much the loss under attack depends on a module; shared out among its units."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hipp_ext.attacks import PGD, Ball, check_precision
from hipp_ext.calibration import Batch, Calibration, CalibrationLike
from hipp_ext.errors import AttackError, CalibrationError
from hipp_ext.groups import Group, find_groups
from hipp_ext.quantities import take_numbers
from hipp_ext.scorers.base import Scorer, evaluating, forward, require_labels
from hipp_ext.scorers.group_loss import (
    Loss,
    Module,
    Reader,
    first_order,
    removal,
    unit_taylor,
    worst_case,
)

Form = Literal["removal", "worst", "grad"]
FORMS = ("removal", "worst", "grad")
Attack = Callable[[nn.Module, Batch], Batch]  # (model, batch) -> the batch, attacked


class MRS(Scorer):
    """A unit's share of its module's robustness sensitivity. Higher = keep; scores of different groups are comparable.

    `MRS().sensitivity(model, calibration)` gives one number per group, the rise of the loss on adversarial inputs, in three
    forms:

    - "removal" (default): when the half of the group's units that robust Taylor ranks lowest is removed;
    - "worst": when the weights that produce the units move by at most `rho` of their norm in the worst direction;
    - "grad": the same to first order, one backward pass for all groups together.

    A unit's score is that number times the unit's robust Taylor score over the mean of its group: Taylor's derivative of the
    loss with respect to a gate on the unit, on adversarial inputs.

    The adversarial inputs are made once, on the model as it is, by PGD on `pixel_values` where a batch has pictures and on the
    token embeddings where it has none, and stay fixed. The calibration needs `labels`; small batches give a finer average.

    Args:
        form: which sensitivity.
        epsilon: L-inf radius, as a share of the range of the batch's pixel_values, or of the root mean square of its
            embeddings.
        attack_steps: of PGD; 0: score the inputs as they are (the clean counterpart).
        attack: (model, batch) -> attacked batch, instead of PGD; for a ball exact in pixels see `hipp_ext.robust.ImageAttack`.
        rho, steps: of the form "worst"; rho also scales "grad".
        ratio: share of the units that "removal" removes.
        seed: of PGD's random start.

    Raises:
        CalibrationError: an unknown form, or, when called, a batch has no labels.
        AttackError: epsilon or rho is not above zero, attack_steps is negative, steps is below one, or ratio not above zero and
            at most one.
        UnsupportedModelError (when called): the model is in half precision and to be attacked; it would be lost in rounding.

    Source: MRPF (arXiv 2410.15176), abstract: a module's sensitivity to adversarial perturbations decides how much of it is
    pruned.
    Differs from the paper: its formula, attack and map to ratios are not public, so all three forms are ours: "worst" follows
    module robust criticality (arXiv 2308.02533), "removal" measures what pruning does, and was the best of them in our trials
    (evals/LOG.md).
    """

    def __init__(
        self,
        form: str = "removal",
        *,
        epsilon: float = 8 / 255,
        attack_steps: int = 10,
        attack: Attack | None = None,
        rho: float = 0.1,
        steps: int = 10,
        ratio: float = 0.5,
        seed: int = 0,
    ):
        if form not in FORMS:
            raise CalibrationError(f"MRS has the forms {', '.join(FORMS)}; got {form!r}.")
        Ball(epsilon=epsilon)
        self.form: Any = form
        self.epsilon, self.attack_steps, self.attack = epsilon, attack_steps, attack
        self.rho, self.steps, self.ratio, self.seed = rho, steps, ratio, seed
        take_numbers(
            self, AttackError, wholes=("attack_steps", "steps", "seed"), finites=("rho", "ratio")
        )
        check_numbers(self.rho, self.ratio, self.steps, self.attack_steps)

    @property
    def name(self) -> str:
        return self._name_with_settings(MRS())

    def sensitivity(
        self,
        model: nn.Module,
        calibration: CalibrationLike | None = None,
        *,
        processor: Any = None,
        groups: Sequence[Group] | None = None,
    ) -> dict[str, float]:
        """Group name -> sensitivity [nats]; arguments and errors as for a call."""
        groups = tuple(groups) if groups is not None else find_groups(model)
        batches = Calibration.of(model, calibration, processor).batches
        with evaluating(model):
            values, _ = self._measure(model, groups, batches)
        return {g.name: v for g, v in zip(groups, values, strict=True)}

    def score(
        self, model: nn.Module, groups: Sequence[Group], batches: Sequence[Batch]
    ) -> Mapping[str, Tensor]:
        values, units = self._measure(model, groups, batches)
        return {g.name: share_out(v, u) for g, v, u in zip(groups, values, units, strict=True)}

    def _measure(
        self, model: nn.Module, groups: Sequence[Group], batches: Sequence[Batch]
    ) -> tuple[list[float], list[Tensor]]:
        require_labels(batches, "MRS needs a loss")
        if self.attack is not None or self.attack_steps:
            check_precision(model)
        attacked = [self._attacked(model, batch) for batch in batches]
        modules = [_module(g) for g in groups]
        return measure(
            model,
            modules,
            _loss,
            attacked,
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
        return batch | {name: pgd(lambda b, moved: _loss(model, {**b, name: moved}), batch, x)}


def measure(
    model: nn.Module,
    modules: Sequence[Module],
    loss: Loss,
    batches: Sequence[Any],
    form: Form,
    *,
    rho: float = 0.1,
    steps: int = 10,
    ratio: float = 0.5,
) -> tuple[list[float], list[Tensor]]:
    """(sensitivity per module, Taylor scores per module and unit) of `loss` on `batches`, which are attacked already or not."""
    units = unit_taylor(model, modules, loss, batches)
    if form == "worst":
        return worst_case(model, modules, loss, batches, rho=rho, steps=steps), units
    if form == "grad":
        return first_order(model, modules, loss, batches, rho=rho), units
    return removal(model, modules, loss, batches, units, ratio=ratio), units


def check_numbers(rho: float, ratio: float, steps: int, attack_steps: int) -> None:
    """Raise AttackError unless MRS can be measured with these."""
    if not (0 < rho < float("inf") and 0 < ratio <= 1 and steps >= 1 and attack_steps >= 0):
        raise AttackError(
            "MRS needs rho above zero, ratio above zero and at most one, steps >= 1 and attack_steps >= 0; "
            f"got {rho=}, {ratio=}, {steps=} and {attack_steps=}."
        )


def share_out(sensitivity: float, units: Tensor) -> Tensor:
    """Scores of a module's units: in proportion to `units`, and `sensitivity` on average."""
    mean = units.double().mean()
    return (
        torch.zeros_like(units, dtype=torch.float64)
        if float(mean) == 0
        else sensitivity * units.double() / mean
    )


def _module(group: Group) -> Module:
    units = torch.arange(group.width).repeat_interleave(group.columns)
    weights = tuple(f"{name}.weight" for name in group.producers)
    return Module(
        name=group.name,
        width=group.width,
        weights=weights,
        readers=(Reader(layer=group.consumer, units=units),),
    )


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return forward(model, batch, labels=True).loss.float()
