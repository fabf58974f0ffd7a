"""The base class of scorers, and the forward pass that several of them share."""

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.calibration import Batch, Calibration, CalibrationLike
from hipp_ext.errors import CalibrationError, UnsupportedModelError
from hipp_ext.groups import Group, check_loaded, check_plain, find_groups, reading_weight, watching
from hipp_ext.modes import evaluating
from hipp_ext.verification import verify_groups

Groups = Sequence[Group]
Scores = Mapping[str, Tensor]  # group name -> (width,) scores, higher = keep


class Scorer(abc.ABC):
    """One score per unit of every group, higher = keep: `scorer(model, calibration)`.

    A scorer ranks the units within a group; an allocator decides how many of them stay. Scores of
    different groups need not be comparable. A new scorer is a frozen dataclass that implements
    `score`, and a line in `hipp_ext.scorers.SCORERS`.

    Attributes:
        needs_calibration: whether it reads batches.
        kinds: kinds of groups that it can score; None: all.
        towers: towers whose groups it can score; None: all.
    """

    needs_calibration: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...] | None] = None
    towers: ClassVar[tuple[str, ...] | None] = None

    def __call__(
        self,
        model: nn.Module,
        calibration: CalibrationLike | None = None,
        *,
        processor: Any = None,
        groups: Groups | None = None,
    ) -> dict[str, Float[Tensor, " width"]]:
        """Group name -> one float32 score per unit, on the CPU, higher = keep.

        Args:
            model: left as it was found: weights, gradients, requires_grad, train/eval.
            calibration: a Calibration, or batches of the tensors that the model's forward takes;
                None: the testbed's, through `processor`.
            processor: processor of a vision-language model; None: the one beside its weights.
            groups: groups to score; None: those of the language tower.

        Raises:
            CalibrationError: no calibration where one is needed, or batches that do not fit.
            UnsupportedModelError: groups cannot be mapped or are of a kind that the scorer does
                not know, weights are offloaded, quantised or adapted, or a score is NaN or
                infinite.
        """
        groups = tuple(groups) if groups is not None else find_groups(model)
        if unknown := [g.name for g in groups if not self.scores(g)]:
            known = [
                f"the {what} {', '.join(names)}"
                for what, names in (("kinds", self.kinds), ("towers", self.towers))
                if names
            ]
            raise UnsupportedModelError(
                f"{self.name} scores groups of {' and '.join(known)} only, and was asked for "
                f"{', '.join(unknown[:4])}. Leave them out of `groups`, or use another scorer."
            )
        check_loaded(model)
        check_plain(model, groups)
        verify_groups(model, groups)
        batches: Sequence[Batch] = ()
        if self.needs_calibration:
            batches = Calibration.of(model, calibration, processor).batches
        with evaluating(model):
            raw = self.score(model, groups, batches)
        scores = {g.name: raw[g.name].detach().float().cpu() for g in groups}
        for g in groups:
            assert scores[g.name].shape == (g.width,), (g.name, scores[g.name].shape)
            if not torch.isfinite(scores[g.name]).all():
                raise UnsupportedModelError(
                    f"{self.name} gave NaN or infinity for {g.name}: weights or activations of "
                    f"{type(model).__name__} are not finite on this calibration (fp16 overflow? "
                    "try bfloat16)."
                )
        return scores

    def passes(self, groups: Groups) -> float:
        """About how many forward passes over the calibration a call takes, in FLOPs."""
        return 1.0 if self.needs_calibration else 0.0

    @classmethod
    def scores(cls, group: Group) -> bool:
        """Whether `group` is of a kind, and in a tower, that the scorer can score."""
        return (cls.kinds is None or group.kind in cls.kinds) and (
            cls.towers is None or group.tower in cls.towers
        )

    @property
    def name(self) -> str:
        """The class and those settings that are not defaults, as written into plans."""
        settings = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        changed = [
            f"{f.name}={value}" for f in settings if (value := getattr(self, f.name)) != f.default
        ]
        return " ".join([type(self).__name__, *changed])

    @abc.abstractmethod
    def score(self, model: nn.Module, groups: Groups, batches: Sequence[Batch]) -> Scores:
        """Group name -> (width,) scores, higher = keep, of any dtype and on any device.

        The model is in eval mode; the batches are checked, and empty where `needs_calibration` is
        False.
        """


def require_labels(batches: Sequence[Batch], why: str) -> None:
    """Raise CalibrationError unless every batch has a label that counts (else NaN)."""
    for i, batch in enumerate(batches):
        if "labels" not in batch:
            raise CalibrationError(
                f"{why}: calibration batch {i} has no labels, only {sorted(batch)}."
            )
        if not bool((batch["labels"][:, 1:] != -100).any()):
            raise CalibrationError(
                f"{why}: all labels of calibration batch {i} are -100, which the loss ignores."
            )


def forward(model: nn.Module, batch: Batch, labels: bool = False, **kwargs: Any) -> Any:
    """The model's output on `batch`, which is moved to the model's device; without a cache.

    Args:
        model: any transformers model.
        batch: tensors that its forward takes.
        labels: pass the batch's labels too, so that the output has a loss.
        kwargs: further arguments of the forward, passed as they are.
    """
    return model(**_inputs(model, batch, labels), **kwargs)


def forward_hidden(model: nn.Module, batch: Batch) -> None:
    """Run the model for its hooks, without its head: logits would take more than all activations.

    A model that is its own `base_model` in transformers computes the logits nevertheless.
    """
    getattr(model, "base_model", model)(**_inputs(model, batch, labels=False))


def _inputs(model: nn.Module, batch: Batch, labels: bool) -> dict[str, Any]:
    """The forward's arguments; use_cache is always False."""
    device = next(model.parameters()).device
    inputs = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v
        for k, v in batch.items()
        if labels or k != "labels"
    }
    return inputs | {"use_cache": False}


def consumer_weight(model: nn.Module, group: Group) -> Tensor:
    """Weight (out, width * inputs) of the linear layer that reads the group's units."""
    return reading_weight(model, group)


def per_unit(values: Float[Tensor, " columns"], group: Group) -> Float[Tensor, "width inputs"]:
    """Values per input column of the consumer, one row per unit."""
    return values.view(group.width, group.inputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputMoments:
    """Statistics of a consumer's inputs over tokens; per column, float64, on the CPU.

    Attributes:
        tokens: number of tokens.
        sum: sum of the inputs.
        square_sum: sum of their squares.
    """

    tokens: int
    sum: Float[Tensor, " columns"]
    square_sum: Float[Tensor, " columns"]

    @property
    def norm(self) -> Float[Tensor, " columns"]:
        """L2 norm over all tokens."""
        return self.square_sum.sqrt()

    @property
    def variance(self) -> Float[Tensor, " columns"]:
        """Population variance over tokens."""
        mean = self.sum / max(self.tokens, 1)
        return (self.square_sum / max(self.tokens, 1) - mean.square()).clamp_min(0)


def valid_tokens(batch: Batch) -> Tensor:
    """(batch, tokens) mask of tokens that are not padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


@torch.no_grad()
def input_moments(
    model: nn.Module, groups: Groups, batches: Sequence[Batch]
) -> dict[str, InputMoments]:
    """Group name -> moments of its consumer's inputs, in one forward pass per batch.

    Args:
        model: left as it was found.
        groups: groups whose consumers are watched.
        batches: calibration batches; padding is not counted.
    """
    size = {g.name: g.width * g.inputs for g in groups}
    sums = {n: torch.zeros(k, dtype=torch.float64) for n, k in size.items()}
    squares = {n: torch.zeros(k, dtype=torch.float64) for n, k in size.items()}

    def add(group: Group, x: Tensor, part: slice) -> None:
        sums[group.name][part] += x.sum(0, dtype=torch.float32).double().cpu()
        squares[group.name][part] += x.float().square().sum(0).double().cpu()

    tokens = _visit_inputs(model, groups, batches, add)
    return {
        g.name: InputMoments(tokens=tokens[g], sum=sums[g.name], square_sum=squares[g.name])
        for g in groups
    }


def _visit_inputs(
    model: nn.Module,
    groups: Groups,
    batches: Sequence[Batch],
    visit: Callable[[Group, Float[Tensor, "tokens columns"], slice], None],
) -> dict[Group, int]:
    """Call `visit` with every group and its consumer's inputs, in one forward pass per batch.

    Args:
        model: put into eval mode for the passes.
        groups: groups whose consumers are watched.
        batches: calibration batches.
        visit: function of a group, some inputs of its consumer (tokens, columns) in the model's
            dtype and on the layer's device, and which columns they are. Of the language tower's
            tokens it gets all but padding, of a vision tower's all patches. A mixture of experts is
            shown expert by expert, each with the tokens that are sent to it; the inputs of the
            others are 0.

    Returns:
        Number of tokens that each group's block has seen.
    """
    counted = torch.empty(0)  # mask of the tokens of the batch that is running
    seen = dict.fromkeys(groups, 0)
    running: set[Group] = set()  # mixtures that the batch has come to

    def look(group: Group, x: Tensor, tokens: Tensor | None, part: slice) -> None:
        x = x.detach().flatten(0, -2)
        if group.tower == "language":
            mask = counted.flatten().to(x.device)
            x = x[mask if tokens is None else mask[tokens]]
        if tokens is None:
            seen[group] += len(x)
        elif group not in running:
            running.add(group)
            seen[group] += int(counted.sum())
        visit(group, x, part)

    with contextlib.ExitStack() as stack, evaluating(model):
        for g in groups:
            stack.enter_context(watching(model, g, functools.partial(look, g)))
        for batch in batches:
            counted = valid_tokens(batch)
            running.clear()
            forward_hidden(model, batch)
    return seen
