"""Least squares instead of training: consumers that lost inputs make up for them, bottom to top."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import PICTURES
from hipp_ext.groups import Group, Tower
from hipp_ext.kinds import KINDS
from hipp_ext.modes import evaluating
from hipp_ext.plan import PruningPlan
from hipp_ext.progress import Tick, counting
from hipp_ext.projections import as_stored, projection
from hipp_ext.scorers.base import valid_tokens
from hipp_ext.surgery.consumers import Consumer, MaskedBlock, lacking_outputs, standing_in
from hipp_ext.surgery.least_squares import RIDGE, Products, improved
from hipp_ext.surgery.streams import Stream, streams
from hipp_ext.units import keep_masks

ROWS = (
    256  # of built-in calibration: with 64, the testbed's models knew fewer facts than sliced ones
)
HELD_OUT = 4  # one row of so many is held out, to see whether a fit carries over
FEW_WORDS = 500  # different tokens of a text: a README has more, questions from one template fewer
MIN_ROWS = 8  # with fewer, what is held out tells nothing: about a hundred tokens, much alike
TOWERS: tuple[Tower, ...] = ("vision", "language")  # in the order in which a model runs them
_log = logging.getLogger(__name__)


@torch.no_grad()
def reconstructed_weights(
    model: nn.Module,
    groups: Sequence[Group],
    plan: PruningPlan,
    batches: Sequence[Batch],
    *,
    ridge: float = RIDGE,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Consumer name -> its weight with the kept inputs alone, dtype, device and layout as before.

    Consumers (o_proj, down_proj) are fitted one after the other, from the bottom of the model to
    its top, on what the model computes that is pruned and reconstructed below. For one with weight
    W and inputs X (tokens x columns, padding excluded), of which the columns S are kept:

        W' = argmin ||X W^T + DRIFT * (H - H') - X_S W'^T||^2 + lambda ||W' - W_S||^2,

    where H and H' are the residual streams that the block reads in the dense and in the pruned
    model (no drift is made up for where the block's outputs are normed or scaled before they are
    added), and lambda is `ridge` times the mean square sum of a column of X_S. W' is used where it
    carries over: a first solution without every HELD_OUT-th row of the calibration must bring the
    outputs on these rows nearer to the target than W_S does. Of PULLS times the ridge, the one with
    the least error there is used for all rows. With fewer than MIN_ROWS rows none is held out. On
    the whole calibration the outputs are never further away than with W_S: where they would be
    (after rounding to a narrow dtype, or a solution that is not finite), W_S is used. The number of
    fitted layers is logged. Biases stay as they are. Groups that keep everything, or nothing, are
    left out, and so are mixtures of experts. The model is left as it was.

    Cost: some five passes of the calibration through the pruned towers, whatever their depth:
    three in the pruned model, less than two in the dense one. While a group is solved, some
    40 * columns^2 bytes in float64. Three hidden states of every calibration token are kept on the
    model's device: what goes into the tower, and what has come out of the last layer in either
    model. For LLaVA-1.5-7B and 256 rows of 700 tokens they are 4 GB.

    Args:
        model: the dense model.
        groups: the groups of `plan`, in its order, as `hipp_ext.surgery.masks.match` returns them.
        plan: any plan for the model.
        batches: calibration. Only what it shows is reconstructed, so it should be like the data
            that the model will see, and there should be much of it.
        ridge: pull towards the sliced weight; 0 relies on the calibration alone.
        progress: show which layer is fitted.

    Warns:
        UserWarning: layers have more kept columns than the calibration has tokens, the
            calibration has fewer than MIN_ROWS rows, or its rows are texts of few words.

    Raises:
        UnsupportedModelError: activations are NaN or infinite on this calibration.

    Source: the layer-wise objective of OSSCAR (arXiv 2403.12983), on the inputs of the model that
    is pruned below as in SparseGPT (arXiv 2301.00774).
    Differs from the papers: the plan chooses the units, beforehand; rows are held out. Half of the
    drift is made up for. The ridge pulls towards the sliced weight, which is safer in directions
    that the calibration does not show. Dense inputs, dense outputs as the target (as in GPTAQ,
    arXiv 2504.02692) and FLAP's bias (arXiv 2312.11983) were tried: see evals/studies/LOG.md.
    """
    masks = keep_masks(plan)
    changed: dict[Group, Consumer | MaskedBlock] = {
        g: Consumer.sliced(projection(model, g.consumer), torch.tensor(e.kept).long(), g.columns)
        if g.is_linear
        else MaskedBlock(model, g, masks[g.name])
        for g, e in zip(groups, plan.groups, strict=True)
        if e.keep < e.width
    }
    consumers = {g: c for g, c in changed.items() if isinstance(c, Consumer) and len(c.kept)}
    rows = sum(len(b["input_ids"]) for b in batches)
    if consumers and rows < MIN_ROWS:
        warnings.warn(
            f"A calibration of {rows} rows is too little to hold any out and see whether the "
            f"reconstruction carries over: give {MIN_ROWS} or more.",
            stacklevel=2,
        )
    with evaluating(model), counting(progress, "reconstructing, layer") as tick:
        _fit_towers(model, changed, batches, held_out=rows >= MIN_ROWS, ridge=ridge, tick=tick)
    _warn_of_few_tokens({g.consumer: c for g, c in consumers.items()})
    _warn_of_like_rows(model, batches)
    fitted = sum(c.fitted for c in consumers.values())
    _log.info("%d of %d pruned blocks were reconstructed", fitted, len(consumers))
    return {g.consumer: as_stored(c.module, c.weight) for g, c in consumers.items()}


def _fit_towers(
    model: nn.Module,
    changed: Mapping[Group, Consumer | MaskedBlock],
    batches: Sequence[Batch],
    *,
    held_out: bool,
    ridge: float,
    tick: Tick,
) -> None:
    below: list[Consumer | MaskedBlock] = []  # in the towers that run before
    for tower in TOWERS:
        own = {g: c for g, c in changed.items() if g.tower == tower}
        if any(isinstance(c, Consumer) and len(c.kept) for c in own.values()):
            dense = streams(model, tower, batches)
            pruned = [replace(stream) for stream in dense]
            if below:
                with standing_in(below):
                    pruned = streams(model, tower, batches)
            pairs = list(zip(dense, pruned, strict=True))
            _fit_tower(own, pairs, held_out=held_out, ridge=ridge, tick=tick)
        below += own.values()


def _fit_tower(
    changed: Mapping[Group, Consumer | MaskedBlock],
    pairs: Sequence[tuple[Stream, Stream]],
    *,
    held_out: bool,
    ridge: float,
    tick: Tick,
) -> None:
    """Fit a tower's consumers from the bottom to the top, block by block as its layers run them."""
    order, last = list(KINDS), max(g.layer for g in changed)
    for number in range(last + 1):
        own = [g for g in changed if g.layer == number]
        own.sort(key=lambda g: order.index(g.kind))
        for i, group in enumerate(own):
            one = changed[group]
            if isinstance(one, Consumer) and len(one.kept):
                before = [changed[g] for g in own[:i]]
                _fit(group, one, before, pairs, held_out, ridge)
        for dense, pruned in pairs:
            dense.pass_layer(number)
            with standing_in(changed[g] for g in own):
                pruned.pass_layer(number)
        tick(number + 1, last + 1)


def _fit(
    group: Group,
    consumer: Consumer,
    before: Sequence[Consumer | MaskedBlock],
    pairs: Sequence[tuple[Stream, Stream]],
    held_out: bool,
    ridge: float,
) -> None:
    """Replace the weight of `consumer`, where a better one is found.

    Args:
        group: group of the consumer.
        consumer: a sliced one.
        before: those that the layer runs before it.
        pairs: streams of the dense and of the pruned model, at the group's layer.
        held_out: hold out every HELD_OUT-th row.
        ridge: pull towards the slice.
    """
    fitted, held = Products.none(consumer.weight), Products.none(consumer.weight)
    for dense, pruned in pairs:
        found = lacking_outputs(group, consumer, before, dense, pruned)
        if found is None:
            continue
        x, lacking = found
        row = dense.row_of(len(x)).to(x.device)
        later = (row % HELD_OUT == HELD_OUT - 1) & held_out
        for products, chosen in ((fitted, ~later & (row >= 0)), (held, later & (row >= 0))):
            products.add(x[chosen], lacking[chosen])
        consumer.tokens += int((row >= 0).sum())
    if not (fitted.finite and held.finite):
        raise UnsupportedModelError(
            f"The inputs of {group.consumer} are NaN or infinite on this calibration, so that it "
            "cannot be reconstructed (fp16 overflow? try bfloat16). Nothing was changed."
        )
    new = improved(consumer.weight, fitted, held, ridge)
    _log.debug("%s: %s", group.consumer, "sliced" if new is None else "reconstructed")
    if new is not None:
        consumer.weight, consumer.fitted = new, True


def _warn_of_few_tokens(consumers: Mapping[str, Consumer]) -> None:
    few = {n: c for n, c in consumers.items() if c.tokens < len(c.kept)}
    for name, c in list(few.items())[:1]:
        warnings.warn(
            f"{len(few)} of {len(consumers)} layers are fitted to fewer tokens than they have "
            f"columns ({c.tokens} tokens for {len(c.kept)} columns in {name}): give more "
            "calibration, or expect little of the reconstruction.",
            stacklevel=3,
        )


def _warn_of_like_rows(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Rows that are held out of data from one template are fitted as well as the others."""
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    pictured = any(batch.get(name) is not None for batch in batches for name in PICTURES)
    if pictured or vocabulary < 10 * FEW_WORDS:
        return
    tokens = torch.cat([batch["input_ids"][valid_tokens(batch)].cpu() for batch in batches])
    if (different := len(tokens.unique())) < FEW_WORDS:
        warnings.warn(
            f"The rows of the calibration are much alike: of {len(tokens):,} tokens {different} "
            "are different. Weights that are fitted to them may serve other texts worse: add rows "
            "of general text, and look at answers with `hipp perplexity`.",
            stacklevel=3,
        )
