"""Repair without training: a consumer that lost inputs learns, by ridge regression, to give its old outputs without them."""

import logging
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups import Group, linear
from hipp_ext.masks import unit_entries
from hipp_ext.plan import PruningPlan
from hipp_ext.scorers.base import visit_inputs

RIDGE = 1e-2
ROWS = 256  # of built-in calibration: with a scorer's 64, the testbed's repaired models knew fewer facts than the sliced ones
MEMORY_LIMIT = 2 * 2**30  # bytes
_log = logging.getLogger(__name__)


@torch.no_grad()
def compensated_weights(
    model: nn.Module,
    groups: Sequence[Group],
    plan: PruningPlan,
    batches: Sequence[Batch],
    *,
    ridge: float = RIDGE,
    memory_limit: int = MEMORY_LIMIT,
) -> dict[str, Tensor]:
    """Consumer name -> its weight for the units that `plan` keeps, (out, kept columns), dtype and device of the old one.

    For a consumer (o_proj, down_proj) with weight W and dense inputs X (tokens x columns, padding excluded), S the kept
    columns: W' = argmin ||X W^T - X_S W'^T||^2 + lambda ||W' - W_S||^2, lambda = `ridge` times the mean square sum of a
    column of X. On the calibration data the outputs are never further from the dense ones than after plain slicing: a
    solution that is (rounded to a narrow dtype, say, or not finite) gives way to W_S. Biases stay as they are. Groups that
    keep everything are left out. The model is left as it was.

    Cost: one forward pass over the calibration for every chunk of groups whose Gram matrices (4 * columns^2 bytes each, on the
    layer's device) fit into `memory_limit`, one group at least; and some 50 * columns^2 bytes while a group is solved in
    float64. By that, LLaVA-1.5-7B needs 17 GB of Gram matrices, so ten passes at 2 GiB, and 6 GB for a down_proj.

    Args:
        model: the dense model.
        groups: those of `plan`, in its order, as `hipp_ext.surgery.match` returns them.
        plan: whoever made it.
        batches: calibration; only what it shows is repaired, so it should be of the user's own kind, and much of it.
        ridge: pull towards the sliced weight; 0 trusts the calibration alone.
        memory_limit: for the Gram matrices [bytes].

    Raises:
        UnsupportedModelError: activations are NaN or infinite on this calibration.

    Source: the layer-wise reconstruction objective of OSSCAR (arXiv 2403.12983).
    Differs from the paper: the plan chooses the units, beforehand; the ridge pulls towards the sliced weight, which is safer
    in directions that the calibration does not show. All groups are solved on the dense model's inputs. Inputs from repaired
    earlier layers, and FLAP's bias (arXiv 2312.11983), were tried: see evals/LOG.md.
    """
    shrunken = {g: torch.tensor(e.kept) for g, e in zip(groups, plan.groups, strict=True) if e.keep < e.width}
    weights: dict[str, Tensor] = {}
    for chunk in _chunks(list(shrunken), memory_limit):
        grams = _grams(model, chunk, batches)
        for g in chunk:
            kept = unit_entries(shrunken[g], g.columns)
            weights[g.consumer] = _repair(g, linear(model, g.consumer).weight, grams.pop(g.name), kept, ridge)
    return weights


def _chunks(groups: Sequence[Group], memory_limit: int) -> Iterator[list[Group]]:
    """The groups in order, in runs whose Gram matrices together stay within the limit."""
    chunk: list[Group] = []
    used = 0
    for g in groups:
        size = 4 * (g.width * g.columns) ** 2
        if chunk and used + size > memory_limit:
            yield chunk
            chunk, used = [], 0
        chunk.append(g)
        used += size
    if chunk:
        yield chunk


def _grams(model: nn.Module, groups: Sequence[Group], batches: Sequence[Batch]) -> dict[str, Float[Tensor, "columns columns"]]:
    """Group name -> X^T X of its consumer's inputs X, float32, where the layer is."""
    grams: dict[str, Tensor] = {}
    for g in groups:
        columns = g.width * g.columns
        grams[g.name] = torch.zeros(columns, columns, device=linear(model, g.consumer).weight.device)

    def add(group: Group, x: Tensor) -> None:
        x = x.float()
        grams[group.name].addmm_(x.T, x)

    visit_inputs(model, groups, batches, add)
    return grams


def _repair(group: Group, weight: Tensor, gram: Tensor, kept: Tensor, ridge: float) -> Tensor:
    if not torch.isfinite(gram.diagonal()).all():  # an entry of a Gram matrix is never larger than those on its diagonal
        raise UnsupportedModelError(
            f"The inputs of {group.consumer} are NaN or infinite on this calibration, so that it cannot be compensated "
            "(fp16 overflow? try bfloat16). Nothing was changed."
        )
    dense, gram, kept = weight.double(), gram.double(), kept.to(weight.device)
    sliced, lost = dense.index_select(1, kept), dense.index_fill(1, kept, 0)
    missing = lost @ gram
    inner = gram.index_select(0, kept).index_select(1, kept)
    inner.diagonal().add_(ridge * gram.diagonal().mean())
    factor, _ = torch.linalg.cholesky_ex(inner)  # should it fail, the errors below tell
    change = torch.cholesky_solve(missing.index_select(1, kept).T, factor).T
    new = (sliced + change).to(weight.dtype)
    before = float((missing * lost).sum())  # ||X D^T||^2 for a difference D from the dense weight
    difference = lost.index_add_(1, kept, sliced - new.double())
    after = float((difference @ gram).mul_(difference).sum())
    _log.info("%s: squared output error %.4g sliced, %.4g compensated", group.consumer, before, after)
    return new if after < before else sliced.to(weight.dtype)
