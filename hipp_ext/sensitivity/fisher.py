"""Fisher sensitivity: all groups at all levels from one forward and one backward pass."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hipp_ext.families import borrows_keys
from hipp_ext.groups import Group, Tower, decoder, tower_layers, watching
from hipp_ext.kinds.mixture import Mixture
from hipp_ext.modes import replaced_forward, training_only
from hipp_ext.output_head import OutputHead
from hipp_ext.progress import Tick
from hipp_ext.projections import inputs_of, is_projection, outputs_of
from hipp_ext.sensitivity.picture_rows import picture_rows, picture_token_count
from hipp_ext.sensitivity.replay import CalibrationReplay, ReplayBatch, chunks
from hipp_ext.steps import NOTHING_KEPT, Steps
from hipp_ext.units import unit_order

# Activations of one pass [bytes] above which they are computed again in the backward pass.
MEMORY_LIMIT = 4 << 30
HIDDEN_NAMES = ("hidden_states", "hidden_state")  # what layers call their first argument


def fisher_curve(
    contributions: Float[Tensor, "rows width"], score: Float[Tensor, " width"], sections: int = 1
) -> Float[Tensor, "rows removals"]:
    """KL of each row [nats, summed over its counted positions] by number of removed units.

    Entry k is for the k units with the lowest scores of each section, from 0 (where it is 0) to
    all. It is the
    second-order estimate: half the square of the sum of the units' contributions. It grows with k
    where contributions are independent; removed units that compensate each other may bring it down.

    Args:
        contributions: see `unit_contributions`.
        score: score per unit, higher = keep.
        sections: see `Group.sections`.
    """
    ascending = contributions.double()[:, unit_order(score, sections).flip(0)]
    removed = ascending.cumsum(1)[:, sections - 1 :: sections]
    return nn.functional.pad(removed, (1, 0)).square() / 2


def unit_contributions(
    model: nn.Module,
    replay: CalibrationReplay,
    groups: Sequence[Group],
    *,
    seed: int = 0,
    memory_limit: int = MEMORY_LIMIT,
    tick: Tick = lambda done, total: None,
    steps: Steps = NOTHING_KEPT,
) -> dict[str, Float[Tensor, "rows width"]]:
    """Group name -> what a gate on each unit changes, (rows, width) float32; see `fisher_curve`.

    It is the derivative, by the gate, of a random combination of each row's logits: at every
    counted position a random root of the Fisher information, independent of the others. So the
    expected product of two units' values is their entry in the Fisher information of the row, which
    is the second derivative of its KL divergence. All groups and levels share the same numbers.

    Units before the language tower are reached through it: the gradients of its answers flow on
    into projector and vision tower. Where it is not known which row a token of a picture belongs to
    (see `picture_rows`), the first row has what the whole batch changes; the expectation of its
    square is the sum over the rows, since their signs are independent.

    Weights get no gradients. Products of activations and gradients are summed in float32. Cost: one
    forward and one backward pass, in FLOPs two forward passes; three where the activations of a
    batch take more than `memory_limit`, and are computed again layer by layer (never in models
    whose layers share keys and values, which keep all activations).

    Args:
        model: left as it was found.
        replay: the calibration.
        groups: groups of any towers; the replay holds whole batches where some lie before the
            language tower.
        seed: random seed of the combinations.
        memory_limit: activations of a batch that may be in memory at once [bytes].
        tick: called with (batches done, all).
        steps: where the batches are kept, and found if an interrupted run left them.

    Source: Fisher information and KL, Martens (arXiv 1412.1193); structured removal by it, Optimal
    BERT Surgeon (arXiv 2203.07259).
    Differs from the papers: they draw labels from the model's distribution, or take those of the
    data. Of a model that is sure of its answers a few hundred drawn labels are all the same, and
    the estimate is a hundred times too small. Random signs on every probability have the same
    expectation, and a fraction of the variance.
    """
    found: dict[str, list[Tensor]] = {g.name: [] for g in groups}
    towers: tuple[Tower, ...] = tuple(dict.fromkeys(g.tower for g in groups))
    whole = towers != ("language",)
    # Where layers attend to the keys of others, they cannot be computed again one by one.
    apart = not any(borrows_keys(m) for m in decoder(model).modules())

    def of_batch(batch: ReplayBatch) -> dict[str, Tensor]:
        recompute = apart and _activation_bytes(model, batch, towers) > memory_limit
        with _watched(model, groups, batch) as sums, _differentiable(model, towers, recompute):
            hidden = batch.last_hidden(model, whole)
            hidden.backward(_root_gradient(model, replay.head, batch, hidden, seed))
        return {name: values.cpu() for name, values in sums.items()}

    with training_only(model, []), torch.enable_grad():
        for number, batch in enumerate(replay.batches, 1):
            shapes = {g.name: (batch.size, g.width) for g in groups}
            sums = steps.step(f"fisher-{number}", shapes, functools.partial(of_batch, batch))
            for g in groups:
                found[g.name].append(sums[g.name])
            tick(number, len(replay.batches))
    return {name: torch.cat(parts) for name, parts in found.items()}


@contextlib.contextmanager
def _watched(
    model: nn.Module, groups: Sequence[Group], batch: ReplayBatch
) -> Iterator[dict[str, Tensor]]:
    """Yield group name -> (rows, width) sums of input times gradient, filled by a backward pass.

    They stay 0 where a layer does not run (one that reads pictures, in a batch without any), or
    where nothing reads what it puts out.
    """
    rows, length = batch.size, _tokens(batch) // batch.size
    sums = {g.name: torch.zeros(rows, g.width) for g in groups}
    calls = Counter[str]()

    def look(group: Group, x: Tensor, tokens: Tensor | None, part: slice) -> None:
        row_of = None if tokens is None else tokens // length
        if group.tower != "language":
            assert batch.batch is not None, "the replay holds whole batches"
            row_of = picture_rows(model, batch.batch, x.shape)
            row_of = (
                torch.zeros(x.shape[:-1].numel(), dtype=torch.long) if row_of is None else row_of
            )

        def add(gradient: Tensor) -> None:
            products = x.detach().float() * gradient.float()
            if row_of is None:
                of_rows = products.view(rows, -1, x.shape[-1]).sum(1)
            else:
                of_rows = products.new_zeros(rows, x.shape[-1])
                of_rows.index_add_(0, row_of.to(x.device), products.flatten(0, -2))
            units = torch.arange(group.width, device=x.device).repeat_interleave(group.inputs)[part]
            found = sums[group.name].to(x.device)
            sums[group.name] = found.index_add(1, units, of_rows)
            calls[group.name] += 1

        if x.requires_grad:  # not in the first pass of a layer that is computed again
            x.register_hook(add)

    with contextlib.ExitStack() as stack:
        for g in groups:
            stack.enter_context(watching(model, g, functools.partial(look, g)))
        yield sums
    for g in groups:  # a call for every picture: nothing tells whose it was
        if g.tower != "language" and calls[g.name] > 1:
            total = sums[g.name].sum(0)
            sums[g.name].zero_()[0] = total


@contextlib.contextmanager
def _differentiable(model: nn.Module, towers: Sequence[Tower], recompute: bool) -> Iterator[None]:
    """Inside the block gradients flow down to the inputs of the first layer of each tower.

    Args:
        model: its weights are frozen.
        towers: towers with groups.
        recompute: keep only the inputs of each layer, and compute the rest again when it is needed.
    """

    def start(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden, rest, others = _hidden_first(args, kwargs)
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        return (hidden, *rest), others

    with contextlib.ExitStack() as stack:
        for tower in dict.fromkeys(("language", *towers)):
            layers = tower_layers(model, tower)
            for layer in layers if tower == "projector" else layers[:1]:
                stack.callback(layer.register_forward_pre_hook(start, with_kwargs=True).remove)
            for layer in layers if recompute and tower != "projector" else ():
                stack.enter_context(replaced_forward(layer, _recomputing(layer.forward)))
        yield


def _hidden_first(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
    """(hidden states, further positional arguments, keyword arguments) of a layer's call."""
    if args:
        return args[0], args[1:], kwargs
    name = next(name for name in HIDDEN_NAMES if name in kwargs)
    return kwargs[name], (), {k: v for k, v in kwargs.items() if k != name}


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a layer whose activations are computed again in the backward pass.

    The variant of `checkpoint` is the reentrant one: the other one does not call hooks on tensors
    of the second pass.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        hidden, rest, others = _hidden_first(args, kwargs)
        return checkpoint(
            lambda hidden: forward(hidden, *rest, **others), hidden, use_reentrant=True
        )

    return run


def _root_gradient(
    model: nn.Module, head: OutputHead, batch: ReplayBatch, hidden: Tensor, seed: int
) -> Tensor:
    """Gradient, by the last hidden states, of the logits along random roots of their Fisher."""
    parts, done = [], 0
    for part in chunks(model, batch.counted(hidden.detach())):
        part = part.detach().requires_grad_()
        logits = head(model, part)
        positions = range(done, done := done + len(part))
        signs = torch.stack([_signs(batch, i, seed, logits[0]) for i in positions])
        root = fisher_root(logits.detach(), signs)
        parts.append(torch.autograd.grad(logits, part, root)[0])
    gradient = torch.zeros_like(hidden)
    rows, places = batch.rows.to(hidden.device), batch.places.to(hidden.device)
    gradient[rows, places] = torch.cat(parts).to(gradient.device)
    return gradient


def fisher_root(
    logits: Float[Tensor, "P vocabulary"], signs: Float[Tensor, "P vocabulary"]
) -> Float[Tensor, "P vocabulary"]:
    """sqrt(p) s - p (sqrt(p) . s), elementwise but for the dot, for probabilities p and signs s.

    Over random signs its second moment is diag(p) - p p^T, the Fisher information of the logits.
    """
    probabilities = logits.softmax(-1)
    scaled = probabilities.sqrt() * signs
    return scaled - probabilities * scaled.sum(-1, keepdim=True)


def _signs(
    batch: ReplayBatch, position: int, seed: int, like: Float[Tensor, " vocabulary"]
) -> Float[Tensor, " vocabulary"]:
    """Random signs, which depend on the tokens of the position's row, its number there, the seed.

    So a row has the same ones in any batch, with any padding.
    """
    row = int(batch.rows[position])
    number = position - int(torch.searchsorted(batch.rows, row))
    start = int(batch.row_keys[row][:14], 16) + (seed << 20) + number
    generator = torch.Generator().manual_seed(start % 2**63)  # the same on all devices
    drawn = torch.randint(2, like.shape, generator=generator, dtype=torch.int8)
    return 2.0 * drawn.to(like.device) - 1


def _activation_bytes(model: nn.Module, batch: ReplayBatch, towers: Sequence[Tower]) -> int:
    """About what the backward pass of a batch keeps: inputs and outputs of all linear layers."""
    total = _tokens(batch) * token_bytes(model, "language")
    if "vision" in towers and batch.batch is not None:
        total += picture_token_count(model, batch.batch) * token_bytes(model, "vision")
    return total


def token_bytes(model: nn.Module, tower: Tower) -> int:
    """Bytes of the inputs and outputs of all linear layers of a tower, for each token: about what
    a backward pass keeps.
    """
    layers = tower_layers(model, tower)
    projections: list[Any] = [m for m in layers.modules() if is_projection(m)]
    features = sum(inputs_of(m) + outputs_of(m) for m in projections)
    for mixture in filter(None, map(Mixture.of, layers.modules())):
        features += mixture.top_k * (4 * mixture.width + 2 * mixture.hidden)
    return features * (projections[0].weight.element_size() if projections else 4)


def _tokens(batch: ReplayBatch) -> int:
    """Number of tokens of a batch, padding included."""
    return next(
        value.shape[:2].numel()
        for name in ("inputs_embeds", "input_ids")
        if isinstance(value := batch.inputs.get(name), Tensor)
    )
