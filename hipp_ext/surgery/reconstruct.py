"""Least squares instead of training: a consumer that lost inputs is fitted to its dense outputs."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups import Group, linear
from hipp_ext.plan import PruningPlan
from hipp_ext.scorers.base import valid_tokens, visit_inputs
from hipp_ext.units import unit_entries

RIDGE = 1e-2
ROWS = (
    256  # of built-in calibration: with 64, the testbed's models knew fewer facts than sliced ones
)
HELD_OUT = 4  # one row of so many is held out, to see whether a fit carries over
MIN_ROWS = 8  # with fewer, what is held out tells nothing: about a hundred tokens, much alike
PULLS = (1.0, 10.0, 100.0)  # times the ridge, of which held-out rows choose one
MEMORY_LIMIT = 2 * 2**30  # [bytes]
_log = logging.getLogger(__name__)


@torch.no_grad()
def reconstructed_weights(
    model: nn.Module,
    groups: Sequence[Group],
    plan: PruningPlan,
    batches: Sequence[Batch],
    *,
    ridge: float = RIDGE,
    memory_limit: int = MEMORY_LIMIT,
) -> dict[str, Tensor]:
    """Consumer name -> its weight (out, kept columns), dtype and device as before.

    For a consumer (o_proj, down_proj) with weight W and dense inputs X (tokens x columns, padding
    excluded), and S the kept columns:

        W' = argmin ||X W^T - X_S W'^T||^2 + lambda ||W' - W_S||^2,

    lambda = `ridge` times the mean square sum of a column of X. W' is used where it carries over: a
    first solution without every HELD_OUT-th row of the calibration must bring the outputs on these
    rows nearer to the dense ones than plain slicing does. Of PULLS times the ridge, the one with
    the least error there is used for all rows. With fewer than MIN_ROWS rows none is held out. On
    the
    whole calibration the outputs are never further away than after slicing: where they would be
    (after rounding to a narrow dtype, or a solution that is not finite), W_S is used. The number of
    fitted layers is logged. Biases stay as they are. Groups that keep everything, or nothing, are
    left out. The model is left as it was.

    Cost: one forward pass over the calibration for every chunk of groups whose Gram matrices (two
        of
    4 * columns^2 bytes each, on the layer's device) fit into `memory_limit`, one group at least;
    and some 50 * columns^2 bytes while a group is solved in float64. LLaVA-1.5-7B needs 34 GB of
    Gram matrices, so twenty passes at 2 GiB, and 6 GB for a down_proj.

    Args:
        model: the dense model.
        groups: the groups of `plan`, in its order, as `hipp_ext.surgery.masks.match` returns them.
        plan: any plan for the model.
        batches: calibration. Only what it shows is reconstructed, so it should be like the data
            that the model will see, and there should be much of it.
        ridge: pull towards the sliced weight; 0 relies on the calibration alone.
        memory_limit: limit for the Gram matrices [bytes].

    Warns:
        UserWarning: layers have more kept columns than the calibration has tokens, or the
            calibration has fewer than MIN_ROWS rows.

    Raises:
        UnsupportedModelError: activations are NaN or infinite on this calibration.

    Source: the layer-wise reconstruction objective of OSSCAR (arXiv 2403.12983).
    Differs from the paper: the plan chooses the units, beforehand; rows are held out. The ridge
        pulls
    towards the sliced weight, which is safer in directions that the calibration does not show. All
    groups are solved on the dense model's inputs. Inputs from earlier fitted layers, and FLAP's
    bias (arXiv 2312.11983), were tried: see evals/studies/LOG.md.
    """
    shrunken = {
        g: torch.tensor(e.kept)
        for g, e in zip(groups, plan.groups, strict=True)
        if 0 < e.keep < e.width
    }
    if shrunken and (rows := sum(len(b["input_ids"]) for b in batches)) < MIN_ROWS:
        warnings.warn(
            f"A calibration of {rows} rows is too little to hold any out and see whether the "
            f"reconstruction carries over: give {MIN_ROWS} or more.",
            stacklevel=2,
        )
    weights: dict[str, Tensor] = {}
    fitted, few = 0, {}
    for chunk in _chunks(list(shrunken), memory_limit):
        grams = _grams(model, chunk, batches)
        for g in chunk:
            kept, products = unit_entries(shrunken[g], g.columns), grams.pop(g.name)
            if products.tokens < len(kept):
                few[g.consumer] = f"{products.tokens} tokens for {len(kept)} columns"
            weights[g.consumer], better = _fit(
                g, linear(model, g.consumer).weight, products, kept, ridge
            )
            fitted += better
    if few:
        name, counts = next(iter(few.items()))
        warnings.warn(
            f"{len(few)} of {len(shrunken)} layers are fitted to fewer tokens than they have "
            "columns "
            f"({counts} in {name}): give more calibration, or expect little of the reconstruction.",
            stacklevel=2,
        )
    _log.info("%d of %d layers were reconstructed", fitted, len(shrunken))
    return weights


def _chunks(groups: Sequence[Group], memory_limit: int) -> Iterator[list[Group]]:
    """The groups in order, in runs whose Gram matrices together stay within the limit."""
    chunk: list[Group] = []
    used = 0
    for g in groups:
        size = 2 * 4 * (g.width * g.columns) ** 2
        if chunk and used + size > memory_limit:
            yield chunk
            chunk, used = [], 0
        chunk.append(g)
        used += size
    if chunk:
        yield chunk


@dataclass
class _Products:
    """X^T X of a consumer's inputs X, float32, on the layer's device.

    One of the rows to fit on, one of the rows held out.
    """

    fitted: Float[Tensor, "columns columns"]
    held_out: Float[Tensor, "columns columns"]
    tokens: int = 0


def _grams(
    model: nn.Module, groups: Sequence[Group], batches: Sequence[Batch]
) -> dict[str, _Products]:
    """Group name -> the products of its consumer's inputs."""
    grams: dict[str, _Products] = {}
    for g in groups:
        columns = g.width * g.columns
        empty = torch.zeros(columns, columns, device=linear(model, g.consumer).weight.device)
        grams[g.name] = _Products(fitted=empty, held_out=empty.clone())
    rows, done = sum(len(b["input_ids"]) for b in batches), 0
    current: list[tuple[Tensor, int]] = []  # tokens of the batch that count, rows before it

    def tokens(batch: Batch) -> Tensor:
        nonlocal done
        current[:] = [(valid_tokens(batch), done)]
        done += len(batch["input_ids"])
        return current[0][0]

    def add(group: Group, x: Tensor) -> None:
        x, products, (counted, before) = x.float(), grams[group.name], current[0]
        if group.tower == "language":
            row = counted.nonzero()[:, 0].to(x.device)
        else:  # patches, those of a picture side by side
            row = torch.arange(len(x), device=x.device) * len(counted) // len(x)
        held = (row + before) % HELD_OUT == HELD_OUT - 1 if rows >= MIN_ROWS else row < 0
        products.tokens += len(x)
        for gram, part in ((products.fitted, x[~held]), (products.held_out, x[held])):
            gram.addmm_(part.T, part)

    visit_inputs(model, groups, batches, add, tokens)
    return grams


def _fit(
    group: Group, weight: Tensor, products: _Products, kept: Tensor, ridge: float
) -> tuple[Tensor, bool]:
    """The new weight, and whether it is another than the slice."""
    gram = products.fitted + products.held_out
    # An entry of a Gram matrix is never larger than those on its diagonal.
    if not torch.isfinite(gram.diagonal()).all():
        raise UnsupportedModelError(
            f"The inputs of {group.consumer} are NaN or infinite on this calibration, so that it "
            "cannot be reconstructed (fp16 overflow? try bfloat16). Nothing was changed."
        )
    kept = kept.to(weight.device)
    pull = ridge
    if bool(products.held_out.diagonal().any()):
        unseen = {}
        for pull in (ridge * times for times in PULLS):
            before, after = _errors(
                weight, products.held_out, kept, _solve(weight, products.fitted, kept, pull)
            )
            if after < before:  # not if it is NaN, as where a factorisation failed
                unseen[pull] = after
        if not unseen:
            _log.debug("%s: no solution carries over to held-out rows", group.consumer)
            return weight.index_select(1, kept), False
        pull = min(unseen, key=lambda p: unseen[p])
    new = _solve(weight, gram, kept, pull)
    before, after = _errors(weight, gram, kept, new)
    _log.debug(
        "%s: squared output error %.4g sliced, %.4g reconstructed, ridge %g",
        group.consumer,
        before,
        after,
        pull,
    )
    return (new, True) if after < before else (weight.index_select(1, kept), False)


def _solve(weight: Tensor, gram: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """The ridge solution for the kept columns, in the weight's dtype."""
    dense, gram = weight.double(), gram.double()
    missing = dense.index_fill(1, kept, 0) @ gram
    inner = gram.index_select(0, kept).index_select(1, kept)
    inner.diagonal().add_(ridge * gram.diagonal().mean())
    factor, _ = torch.linalg.cholesky_ex(inner)  # should it fail, the errors tell
    change = torch.cholesky_solve(missing.index_select(1, kept).T, factor).T
    return (dense.index_select(1, kept) + change).to(weight.dtype)


def _errors(weight: Tensor, gram: Tensor, kept: Tensor, new: Tensor) -> tuple[float, float]:
    """||X D^T||^2 for the difference D of the slice, and of `new`, from the dense weight."""
    dense, gram = weight.double(), gram.double()
    lost = dense.index_fill(1, kept, 0)
    before = float((lost @ gram).mul_(lost).sum())
    difference = lost.index_add_(1, kept, dense.index_select(1, kept) - new.double())
    return before, float((difference @ gram).mul_(difference).sum())
