"""The Fisher estimate: its algebra, its exactness on average, and what it does not depend on."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PECULIAR, VARIED, build
from plans import dropping_plan, logits, random_scores
from replays import AsFound, batch_for, padded, replay_of, rows_of
from scipy.linalg import hadamard

from hipp_ext import masked, prune
from hipp_ext.groups import find_groups
from hipp_ext.sensitivity.fisher import fisher_curve, fisher_root, unit_contributions
from hipp_ext.sensitivity.positions import counted_positions

MODELS = [*VARIED, *PECULIAR]


def contributions_of(model, batches, **options):
    return unit_contributions(model, replay_of(model, batches), find_groups(model), **options)


def assert_same(found, expected, tolerance=1e-4):
    """Equal relative to the largest value of each group."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        size = float(values.abs().max())
        torch.testing.assert_close(found[name], values, rtol=0, atol=tolerance * size, msg=name)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


# --- the curve


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_a_curve_is_half_the_square_of_what_is_removed(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    contributions = torch.randn(rows, width, generator=generator)
    score = torch.randn(width, generator=generator)
    curve = fisher_curve(contributions, score)
    assert (curve[:, 0] == 0).all() and (curve >= 0).all()
    for k in range(width + 1):
        lowest = score.argsort()[:k]
        expected = contributions[:, lowest].double().sum(1).square() / 2
        torch.testing.assert_close(curve[:, k], expected, rtol=1e-4, atol=1e-7)


def test_a_curve_grows_along_the_ranking_where_units_are_independent():
    """Over the rows the products of two units cancel out, and each adds half its own square."""
    sizes = torch.linspace(0.1, 2, 8)
    independent = torch.tensor(hadamard(8)).float() * sizes
    curve = fisher_curve(independent, sizes).mean(0)
    assert (curve.diff() > 0).all()
    torch.testing.assert_close(curve[1:], sizes.double().square().cumsum(0) / 2)


def test_a_curve_falls_where_removed_units_compensate_each_other():
    """It need not grow: the second unit does the opposite of the first."""
    curve = fisher_curve(torch.tensor([[1.0, -1.0, 1.0]]), torch.tensor([0.1, 0.2, 0.3]))
    assert curve.tolist() == [[0, 0.5, 0, 0.5]]


# --- roots of the Fisher information


def test_roots_have_the_fisher_information_as_their_second_moment():
    """Over all sign vectors: diag(p) - p p^T, which is the second derivative of the divergence."""
    values = 2 * torch.randn(6, dtype=torch.float64)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)), dtype=torch.float64)
    roots = fisher_root(values.expand(64, -1), signs)
    p = values.softmax(-1)
    information = roots.T @ roots / 64
    torch.testing.assert_close(information, torch.diag(p) - torch.outer(p, p))

    def divergence(moved):
        return (p * (p.log() - moved.log_softmax(-1))).sum()

    exact = torch.autograd.functional.hessian(divergence, values)
    torch.testing.assert_close(information, exact, rtol=1e-4, atol=1e-9)
    step = 1e-3 * torch.randn(6, dtype=torch.float64)
    both = divergence(values + step) + divergence(values - step)
    assert float(step @ information @ step) == pytest.approx(float(both), rel=1e-4)


def test_roots_stay_finite_where_the_model_is_sure():
    sure = torch.tensor([[0.0, 200.0, -200.0]])
    root = fisher_root(sure, torch.tensor([[1.0, -1.0, 1.0]]))
    assert torch.isfinite(root).all() and float(root.abs().max()) < 1e-6


@pytest.mark.parametrize("name", ["llama", "llava_gqa"])
def test_on_average_the_estimate_is_the_second_order_divergence(name):
    """Against the second derivative, by autograd in double precision, of the divergence of the
    model by a gate on its lowest units: the mean of seeds lies within four standard errors.
    """
    model, given = build(name), batch_for(name, size=3, labels=True)
    groups, seeds = find_groups(model), 80
    scores, replay = random_scores(groups), replay_of(model, [given])
    drawn = [unit_contributions(model, replay, groups, seed=seed) for seed in range(seeds)]
    exact_model = build(name).double()
    exact_model.set_attn_implementation("eager")
    for group in groups[:2] + groups[-1:]:
        removed = max(1, group.width // 3)
        curves = torch.stack([fisher_curve(d[group.name], scores[group.name]) for d in drawn])
        estimates = curves[:, :, removed].sum(1)
        exact = second_order(exact_model, given, group, scores[group.name].argsort()[:removed])
        error = float(estimates.std()) / seeds**0.5
        assert error < 0.12 * exact
        assert abs(float(estimates.mean()) - exact) < 4 * error


def second_order(model, given, group, units) -> float:
    """Half the second derivative of the summed divergence by how much of `units` is removed."""
    counted = counted_positions(model, given)
    columns = torch.zeros(group.width, group.columns, dtype=torch.float64)
    columns[units] = 1
    floats = {n: v.double() if v.is_floating_point() else v for n, v in given.items()}
    floats.pop("labels")

    def log_probs(removed):
        consumer = model.get_submodule(group.consumer)
        handle = consumer.register_forward_pre_hook(
            lambda _, args: (args[0] * (1 - removed * columns.flatten()),)
        )
        output = model(**floats, use_cache=False).logits[counted].log_softmax(-1)
        handle.remove()
        return output

    nothing = torch.zeros((), dtype=torch.float64)
    dense = log_probs(nothing).detach()

    def divergence(removed):
        return (dense.exp() * (dense - log_probs(removed))).sum()

    return float(torch.autograd.functional.hessian(divergence, nothing)) / 2


# --- what the contributions depend on


@pytest.mark.parametrize("name", MODELS)
def test_contributions_of_all_groups_however_they_are_computed(name):
    """One number per row and unit; computed again in the backward pass; by the other attention."""
    model = build(name)
    batches = [batch_for(name, labels=True), batch_for(name, size=3, seed=1)]
    found = contributions_of(model, batches)
    groups = find_groups(model)
    assert {n: tuple(c.shape) for n, c in found.items()} == {g.name: (5, g.width) for g in groups}
    assert all(c.dtype == torch.float32 and bool((c != 0).all()) for c in found.values())
    assert_same(contributions_of(model, batches, memory_limit=0), found, 1e-6)
    if name != "mllama":  # whose own logits of pictures differ with the kind of attention
        model.set_attn_implementation("eager")
        assert_same(contributions_of(model, batches), found)


def test_seeds_draw_other_roots_and_the_same_ones_again(llama):
    batches = [batch_for("llama")]
    found, other = contributions_of(llama, batches), contributions_of(llama, batches, seed=1)
    for name, values in contributions_of(llama, batches).items():
        assert torch.equal(values, found[name])
        assert not torch.allclose(values, other[name], rtol=0.1)


def test_rows_are_told_apart_by_their_tokens_alone(llama):
    """In another order, spread over other batches, with padding they have the same values."""
    given = batch_for("llama", size=4, labels=True)
    given["labels"][:, :3] = -100
    found = contributions_of(llama, [given])
    order = [2, 0, 3, 1]
    turned = contributions_of(llama, [rows_of(given, order)])
    assert_same(turned, {name: values[order] for name, values in found.items()})
    spread = [rows_of(given, [0]), padded(rows_of(given, [1, 2]), 5), rows_of(given, [3])]
    assert_same(contributions_of(llama, spread), found)
    replay, again = replay_of(llama, [given]), replay_of(llama, spread)
    assert_same(
        {n: again.by_task(v) for n, v in contributions_of(llama, spread).items()},
        {n: replay.by_task(v) for n, v in found.items()},
    )


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "smolvlm"])
def test_padding_changes_nothing(name):
    model, given = build(name), batch_for(name, labels=True)
    assert_same(contributions_of(model, [padded(given)]), contributions_of(model, [given]))


@pytest.mark.parametrize("name", ["llava_gqa", "qwen3"])
def test_curves_do_not_depend_on_the_order_of_units(name):
    """Units permuted in the weights and in the scores."""
    model, given = build(name), batch_for(name)
    groups = find_groups(model)
    scores, found = random_scores(groups), contributions_of(model, [given])
    curves = {g.name: fisher_curve(found[g.name], scores[g.name]) for g in groups}
    orders = {g.name: torch.randperm(g.width) for g in groups}
    for group in groups:
        for part in group.owns:
            parameter = model.get_parameter(part.parameter)
            units = parameter.data.unflatten(part.dim, (group.width, part.size))
            moved = units.index_select(part.dim, orders[group.name])
            parameter.data = moved.flatten(part.dim, part.dim + 1)
    moved = contributions_of(model, [given])
    assert_same(moved, {n: values[:, orders[n]] for n, values in found.items()})
    assert_same(
        {n: fisher_curve(moved[n], scores[n][orders[n]]) for n in curves}, curves, tolerance=1e-3
    )


def test_units_of_half_precision_are_summed_in_float32():
    """A long row: bfloat16 sums of so many products would be wrong by tens of percent."""
    given = batch_for("llama", size=2, length=150)
    exact = contributions_of(build("llama"), [given])
    half = contributions_of(build("llama").bfloat16(), [given])
    for name, values in exact.items():
        assert half[name].dtype == torch.float32
        error = float((half[name] - values).norm() / values.norm())
        assert error < 0.06, (name, error)


def test_a_pruned_model_is_like_the_masked_one():
    """Dropped blocks have no numbers; the units that stay have those of the masked model."""
    model, given = build("llava"), batch_for("llava")
    plan = dropping_plan(model, "language.0.attention", "language.2.ffn", half=("language.1.ffn",))
    kept = {g.name: list(g.kept) for g in plan.groups}
    with masked(model, plan):
        expected = contributions_of(model, [given])
    small = prune(build("llava"), plan)
    found = contributions_of(small, [given])
    dropped = {"language.0.attention", "language.2.ffn"}
    assert found.keys() == expected.keys() - dropped
    assert_same(found, {name: expected[name][:, kept[name]] for name in found})
    assert_same(contributions_of(small, [given], memory_limit=0), found, 1e-6)


@pytest.mark.parametrize(("memory_limit", "runs"), [(0, 2), (1 << 40, 1)])
def test_layers_run_again_where_memory_is_short(memory_limit, runs):
    """The first time without a graph of what they compute."""
    model = build("llama")
    replay, graphs = replay_of(model, [batch_for("llama")]), []
    mlp = model.model.layers[1].mlp
    mlp.register_forward_hook(lambda _, __, output: graphs.append(output.grad_fn is not None))
    unit_contributions(model, replay, find_groups(model), memory_limit=memory_limit)
    assert graphs == [False, True][-runs:]


@pytest.mark.parametrize("memory_limit", [0, 1 << 40])
def test_the_model_is_left_as_it_was_found(memory_limit):
    replay, state = replay_of(build("llava"), [batch_for("llava")]), AsFound("llava")
    groups = find_groups(state.model)
    unit_contributions(state.model, replay, groups, memory_limit=memory_limit)
    state.check()


def test_a_layer_that_does_not_run_contributes_nothing():
    """Mllama's layer that reads pictures, in a batch of text."""
    found = contributions_of(build("mllama"), [batch_for("llama")])
    for name, values in found.items():
        assert bool((values == 0).all()) == (".1." in name), name


def test_a_forward_of_the_instance_survives(llama):
    """accelerate's hooks replace `forward` on the instance, too."""
    model = build("llama")
    layer = model.model.layers[1]
    own = layer.forward
    layer.forward = own
    dense = logits(model, batch_for("llama"))
    found = contributions_of(model, [batch_for("llama")], memory_limit=0)
    assert vars(layer)["forward"] is own
    assert torch.equal(logits(model, batch_for("llama")), dense)
    assert_same(found, contributions_of(llama, [batch_for("llama")]), 1e-6)
