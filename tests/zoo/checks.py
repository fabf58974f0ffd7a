"""What must hold for every family that can be pruned, one function each.

A check raises `Wrong` where a result is not what it must be, `NotApplicable` where the dense model
cannot do what is asked either, and a HippError where the library refuses.
"""

import contextlib
import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext import (
    HiPPPlanner,
    Preference,
    PruningPlan,
    load_pruned,
    masked,
    pad_to_uniform,
    prune,
    save_pruned,
)
from hipp_ext.allocators import Sensitivity, Uniform
from hipp_ext.answers import AnswerLogits
from hipp_ext.groups import Group, find_groups
from hipp_ext.scorers import Magnitude, WandaSP
from hipp_ext.surgery.slices import sliced
from hipp_ext.units import plan_from_counts
from zoo.family import Family
from zoo.sizes import PAD

TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order
RATIO = 0.3
NEW_TOKENS = 3
PARTIAL: Any = {"partial": "report"} if "partial" in signature(find_groups).parameters else {}


class Wrong(AssertionError):
    """A result that is not what it must be."""


class NotApplicable(Exception):
    """The dense model cannot do it either."""


@dataclass(kw_only=True)
class Case:
    """A family under check; what several checks need is made once."""

    family: Family

    @functools.cached_property
    def model(self) -> nn.Module:
        """The dense model, which no check may change."""
        return self.family.build()

    @functools.cached_property
    def batch(self) -> dict[str, Any]:
        """Inputs of two rows."""
        return self.family.batch()

    @functools.cached_property
    def calibration(self) -> list[dict[str, Any]]:
        """Inputs of eight rows with answers."""
        batch = self.family.batch(rows=8, seed=1)
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -2:] = batch["input_ids"][:, -2:]
        return [batch | {"labels": labels}]

    @functools.cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups of the language tower."""
        return found(self.model)

    @functools.cached_property
    def plan(self) -> PruningPlan:
        """A plan that keeps other numbers of units in every group, whichever they are."""
        return some_plan(self.groups)

    @functools.cached_property
    def expected(self) -> Tensor:
        """The logits of the dense model with the units masked."""
        with masked(self.model, self.plan):
            return logits(self.model, self.batch)

    @functools.cached_property
    def pruned(self) -> nn.Module:
        """The smaller model."""
        return prune(self.model, self.plan)


def found(model: nn.Module, tower: str = "language", **options: Any) -> tuple[Group, ...]:
    """The groups of a tower; what cannot be mapped is left whole where that is possible."""
    return find_groups(model, (tower,), **PARTIAL, **options)  # type: ignore[arg-type]


def some_plan(groups: tuple[Group, ...], seed: int = 0, experts: int = 0) -> PruningPlan:
    """Half of the units or so stay, another number in every group, chosen at random; `experts` in
    every mixture, if given.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = {g.name: torch.rand(g.width, generator=generator) for g in groups}
    counts = []
    for i, g in enumerate(groups):
        if experts and g.kind == "experts":
            counts.append(experts)
            continue
        each, least = g.width // g.sections, -(-g.least // g.sections)
        counts.append(g.sections * max(least, min(each - 1, each // 2 + (-1, 0, 1)[i % 3])))
    return plan_from_counts(groups, counts, scores)


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The logits of a forward pass."""
    return model(**batch).logits


def same(got: Tensor, expected: Tensor, what: str) -> None:
    """Raise Wrong unless the logits are the same up to rounding."""
    if got.shape != expected.shape:
        raise Wrong(f"{what}: shapes {tuple(got.shape)} and {tuple(expected.shape)}")
    # Chameleon gives the tokens of pictures the least number there is.
    real = expected.abs() < 1e30
    difference = float((got - expected)[real].abs().max())
    allowed = TOLERANCE * float(expected[real].abs().max())
    if not difference <= allowed:
        raise Wrong(f"{what}: differ by {difference:.3g} (at most {allowed:.3g})")


def same_model(got: nn.Module, expected: nn.Module, batch: dict[str, Any], what: str) -> None:
    """Raise Wrong unless the tensors are the same to the bit, and the logits up to rounding.

    Where a tensor lies in memory decides how some kernels round.
    """
    ours, theirs = got.state_dict(), expected.state_dict()
    if ours.keys() != theirs.keys():
        raise Wrong(f"{what}: tensors {sorted(ours.keys() ^ theirs.keys())}")
    for name, tensor in ours.items():
        if tensor.dtype != theirs[name].dtype or not torch.equal(tensor, theirs[name]):
            raise Wrong(f"{what}: {name} differs")
    same(logits(got, batch), logits(expected, batch), what)


def differs(got: Tensor, dense: Tensor, what: str) -> None:
    """Raise Wrong where a plan changed nothing."""
    if torch.allclose(got, dense, atol=1e-5):
        raise Wrong(f"{what}: as in the dense model")


def padded(batch: dict[str, Any], count: int = 3) -> dict[str, Any]:
    """The batch with padding on the left."""
    shape = batch["input_ids"].shape
    return {
        name: nn.functional.pad(value, (count, 0), value=PAD)
        if isinstance(value, Tensor) and value.shape == shape
        else value
        for name, value in batch.items()
    }


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder that does not exist yet."""
    with tempfile.TemporaryDirectory() as parent:
        yield Path(parent) / "model"


def check_groups(case: Case) -> None:
    """Groups are found, and some have several units."""
    if not any(g.width > 1 for g in case.groups):
        raise Wrong("groups of one unit")


def check_mask(case: Case) -> None:
    """Pruned equals masked, which differs from dense."""
    differs(case.expected, logits(case.model, case.batch), "masked")
    same(logits(case.pruned, case.batch), case.expected, "pruned, masked")


def check_smaller(case: Case) -> None:
    """Exactly the parameters are gone that the plan removes."""
    sizes = [sum(p.numel() for p in m.parameters()) for m in (case.model, case.pruned)]
    total = sum(g.parameters for g in case.groups)
    gone, planned = sizes[0] - sizes[1], total - case.plan.kept_parameters
    if gone != planned:
        raise Wrong(f"{gone} parameters are gone, {planned} planned")


def check_reload(case: Case) -> None:
    """What was saved is loaded, to the bit."""
    with folder() as path:
        save_pruned(case.pruned, path)
        loaded = load_pruned(path)
    same_model(loaded, case.pruned, case.batch, "loaded, saved")
    if getattr(loaded, "hipp_plan", None) != case.plan:
        raise Wrong("the loaded model has lost its plan")


def check_sliced(case: Case) -> None:
    """Slices of sorted weights equal the pruned model, and leave the dense one as it was."""
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    scores = Magnitude()(case.model, groups=case.groups)
    counts = [e.keep for e in case.plan.groups]
    with sliced(case.model, case.groups, scores) as shrink:
        shrink(counts)
        got = logits(case.model, case.batch)
    expected = logits(prune(case.model, plan_from_counts(case.groups, counts, scores)), case.batch)
    same(got, expected, "sliced, pruned")
    if not all(torch.equal(v, before[n]) for n, v in case.model.state_dict().items()):
        raise Wrong("slicing changed the dense model")


def check_drop(case: Case) -> None:
    """Blocks that keep nothing leave; reload too."""
    counts = [g.width for g in case.groups]
    # Attention whose keys later layers share is in query heads, and has to stay.
    first = next(i for i, g in enumerate(case.groups) if g.kind != "query_heads")
    for group in {first, len(counts) - 1} if len(counts) > 2 else {0}:
        counts[group] = 0
    plan = plan_from_counts(
        case.groups, counts, {g.name: torch.arange(float(g.width)) for g in case.groups}
    )
    with masked(case.model, plan):
        expected = logits(case.model, case.batch)
    small = prune(case.model, plan)
    same(logits(small, case.batch), expected, "dropped, masked")
    with folder() as path:
        save_pruned(small, path)
        same(logits(load_pruned(path), case.batch), expected, "dropped and loaded, masked")


def check_query(case: Case) -> None:
    """Query heads as units: pruned equals masked."""
    groups = found(case.model, attention_unit="query")
    if all(g.kind != "query_heads" for g in groups):
        raise NotApplicable("no query heads share keys")
    plan = some_plan(groups)
    with masked(case.model, plan):
        expected = logits(case.model, case.batch)
    same(logits(prune(case.model, plan), case.batch), expected, "pruned, masked")


def check_reconstruct(case: Case) -> None:
    """Least squares runs, and its result is finite."""
    fitted = prune(case.model, case.plan, reconstruct=True, calibration=case.calibration)
    if not torch.isfinite(logits(fitted, case.batch)).all():
        raise Wrong("reconstructed: not finite")


def _planned(case: Case, plan: PruningPlan) -> None:
    total = sum(g.parameters for g in case.groups)
    step = max(g.unit_parameters * g.sections for g in case.groups) / total
    if not RATIO - 1e-9 <= plan.pruning_ratio <= RATIO + step:
        raise Wrong(f"a plan for {RATIO} removes {plan.pruning_ratio:.3f}, in steps of {step:.3f}")


def check_magnitude(case: Case) -> None:
    """A uniform plan by magnitude."""
    _planned(case, Uniform(pruning_ratio=RATIO, scorer=Magnitude(), **PARTIAL).plan(case.model))


def check_sensitivity(case: Case) -> None:
    """A plan by WandaSP and Fisher sensitivity."""
    allocator = Sensitivity(pruning_ratio=RATIO, scorer=WandaSP(), effort="fisher", **PARTIAL)
    _planned(case, allocator.plan(case.model, calibration=case.calibration))


def check_planner(case: Case) -> None:
    """The untrained planner, with the signals that it measures."""
    planner = HiPPPlanner(Preference(1, 1, 1), pruning_ratio=RATIO, cache=None, **PARTIAL)
    _planned(case, planner.plan(case.model, calibration=case.calibration))


def check_unchanged(case: Case) -> None:
    """Whatever was asked of the dense model, its weights are as they were built."""
    fresh = dict(case.family.build().named_parameters())
    if not all(torch.equal(p, fresh[n]) for n, p in case.model.named_parameters()):
        raise Wrong("the dense model was changed")


def _generated(model: nn.Module, batch: dict[str, Any], **options: Any) -> Tensor:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return model.generate(  # type: ignore[operator]
            **batch,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            **options,
        )


def _check_generation(case: Case, **options: Any) -> None:
    try:
        with masked(case.model, case.plan):
            expected = _generated(case.model, case.batch, **options)
    except Exception as error:
        raise NotApplicable(f"dense: {type(error).__name__}: {error}") from error
    got = _generated(case.pruned, case.batch, **options)
    if not torch.equal(got, expected):
        new = [tokens[:, -NEW_TOKENS:].tolist() for tokens in (got, expected)]
        raise Wrong(f"tokens {new[0]} instead of {new[1]}")


def check_generate(case: Case) -> None:
    """Greedy tokens with a cache that grows."""
    _check_generation(case)


def check_no_cache(case: Case) -> None:
    """Greedy tokens without a cache."""
    _check_generation(case, use_cache=False)


def check_static(case: Case) -> None:
    """Greedy tokens with a static cache."""
    _check_generation(case, cache_implementation="static")


def check_padding(case: Case) -> None:
    """Rows with padding on the left: pruned equals masked."""
    batch = padded(case.batch)
    with masked(case.model, case.plan):
        expected = logits(case.model, batch)[:, 3:]
    same(logits(case.pruned, batch)[:, 3:], expected, "padded")


def check_eager(case: Case) -> None:
    """Both implementations of attention give the same for the pruned model, as for the dense."""
    try:
        case.model.set_attn_implementation("eager")  # type: ignore[operator]
        with masked(case.model, case.plan):
            expected = logits(case.model, case.batch)
    except (ValueError, AttributeError) as error:
        raise NotApplicable(str(error)) from error
    finally:
        case.__dict__.pop("model")  # a fresh one for the next
    small = prune(case.family.build(), case.plan)
    small.set_attn_implementation("eager")  # type: ignore[operator]
    same(logits(small, case.batch), expected, "eager")


def check_uniform(case: Case) -> None:
    """Padded to one width: the same logits, and stock transformers loads the folder. All mixtures
    keep the same number of experts, because routers would send tokens to added ones.
    """
    counts = [e.keep for e in case.plan.groups]
    experts = [c for c, g in zip(counts, case.groups, strict=True) if g.kind == "experts"]
    plan = some_plan(case.groups, experts=max(experts, default=0))
    with masked(case.model, plan):
        expected = logits(case.model, case.batch)
    wide = pad_to_uniform(prune(case.model, plan))
    same(logits(wide, case.batch), expected, "padded to one width")
    with folder() as path:
        wide.save_pretrained(path)  # type: ignore[operator]
        stock, report = type(case.model).from_pretrained(path, output_loading_info=True)
    if report["mismatched_keys"] or report["missing_keys"]:
        raise Wrong(f"stock transformers misses {report}")
    same(logits(stock.eval(), case.batch), expected, "loaded by stock transformers")


def check_answers(case: Case) -> None:
    """The answers' logits are the model's own, and the pruned model's, with padding."""
    _check_answers(case, padded(case.batch))


def check_unpadded(case: Case) -> None:
    """The same without padding."""
    _check_answers(case, case.batch)


def _check_answers(case: Case, batch: dict[str, Any]) -> None:
    answers = AnswerLogits(case.model, [batch])
    same(answers(case.model), logits(case.model, batch)[:, -1], "answers, model")
    same(answers(case.pruned), logits(case.pruned, batch)[:, -1], "answers, pruned model")


def check_backward(case: Case) -> None:
    """The pruned model is trained like any other: the same parameters get gradients."""
    learnt = []
    for model in (case.family.build(), prune(case.model, case.plan)):
        model(**case.batch, labels=case.batch["input_ids"]).loss.backward()
        learnt.append({n for n, p in model.named_parameters() if p.grad is not None})
    if learnt[0] != learnt[1]:
        raise Wrong(f"gradients are missing for {sorted(learnt[0] - learnt[1])[:3]}")


def check_vision(case: Case) -> None:
    """The vision tower: pruned equals masked, and reload."""
    _check_tower(case, "vision")


def check_projector(case: Case) -> None:
    """The MLP between the towers: the same."""
    _check_tower(case, "projector")


def _check_tower(case: Case, tower: str) -> None:
    if not case.family.sees:
        raise NotApplicable("a language model")
    groups = found(case.model, tower)
    plan = some_plan(groups)
    with masked(case.model, plan):
        expected = logits(case.model, case.batch)
    differs(expected, logits(case.model, case.batch), f"{tower} masked")
    small = prune(case.model, plan)
    same(logits(small, case.batch), expected, f"{tower} pruned, masked")
    with folder() as path:
        save_pruned(small, path)
        same_model(load_pruned(path), small, case.batch, f"{tower} loaded, saved")


CHECKS: dict[str, Callable[[Case], None]] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
