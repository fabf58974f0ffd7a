"""Vision tower and projector as parts of a plan, beside the language tower."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, build
from torch import nn
from zoo import FAMILIES

from hipp_ext import (
    HiPPPlanner,
    Preference,
    load_pruned,
    masked,
    pad_to_uniform,
    prune,
    save_pruned,
)
from hipp_ext.allocators import Sensitivity, Uniform
from hipp_ext.answers import AnswerLogits
from hipp_ext.budget import Bounds, keep_counts
from hipp_ext.calibration import Calibration
from hipp_ext.cli.options import read_towers
from hipp_ext.errors import BudgetError, DataError, PlanError, UnsupportedModelError
from hipp_ext.groups import find_groups, watching
from hipp_ext.integrations.serving import check_serving
from hipp_ext.likelihood import AnswerLikelihood
from hipp_ext.planner.cost import cost_of
from hipp_ext.planner.state import depths, measure_signals
from hipp_ext.scorers import SCORERS, Magnitude, VisualSensitivity
from hipp_ext.sensitivity.fisher import unit_contributions
from hipp_ext.sensitivity.picture_rows import picture_rows
from hipp_ext.sensitivity.replay import CalibrationReplay
from hipp_ext.surgery.slices import sliced
from hipp_ext.units import plan_from_counts

ALL = ("language", "vision", "projector")
SEEING = ("vision", "projector")
LLAVA = build("llava")
# Heads and channels of vision tower and projector in families whose blocks are shaped differently.
SHAPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "internvl", "mistral3", "aya_vision")


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def half(groups, dropped=()):
    """Counts near a half, and nothing of the groups called `dropped`; scores of the units."""
    generator = torch.Generator().manual_seed(0)
    scores = {g.name: torch.rand(g.width, generator=generator) for g in groups}
    return [0 if g.name in dropped else max(1, g.width // 2) for g in groups], scores


@pytest.mark.parametrize("name", SHAPES)
def test_pruned_equals_masked_equals_sliced_equals_loaded(name, tmp_path):
    model, inputs = FAMILIES[name].build(), FAMILIES[name].batch()
    groups = find_groups(model, SEEING)
    assert {g.tower for g in groups} == set(SEEING)
    counts, scores = half(groups, dropped=("vision.0.attention", "vision.1.ffn"))
    plan = plan_from_counts(groups, counts, scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # verified on a picture
        small = prune(model, plan)
    with masked(model, plan):
        expected = logits(model, inputs)
    allowed = 1e-4 * float(expected.abs().max())
    assert float((logits(model, inputs) - expected).abs().max()) > allowed
    assert torch.allclose(logits(small, inputs), expected, atol=allowed)
    with sliced(model, groups, scores) as shrink:
        shrink(counts)
        assert torch.allclose(logits(model, inputs), expected, atol=allowed)
    with pytest.warns(UserWarning, match="no processor"):
        save_pruned(small, tmp_path / "saved")
    assert torch.equal(logits(load_pruned(tmp_path / "saved"), inputs), logits(small, inputs))


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_fisher_of_rows_does_not_depend_on_their_batch(name):
    """Which row a token of a picture belongs to is known."""
    model, inputs = build(name), batch(name, size=3, labels=True)
    groups = find_groups(model, ALL)
    rows = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(3)]

    def contributions(batches):
        replay = CalibrationReplay(model, Calibration.of(model, batches), whole=True)
        return unit_contributions(model, replay, groups)

    together, alone = contributions([inputs]), contributions(rows)
    for g in groups:
        scale = float(together[g.name].abs().max())
        assert torch.allclose(together[g.name], alone[g.name], atol=1e-4 * scale + 1e-7), g.name


@pytest.mark.parametrize("tower", SEEING)
def test_fisher_is_the_curvature_of_the_divergence(tower):
    """Gates a little below 1: their KL is half the square of what the gates change."""
    inputs, step = batch("llava", size=4, labels=True), 0.02
    groups = find_groups(LLAVA, (tower,))[-1 if tower == "projector" else 1 :][:1]
    replay = CalibrationReplay(LLAVA, Calibration.of(LLAVA, [inputs]), whole=True)
    squares = []
    for seed in range(40):
        changes = unit_contributions(LLAVA, replay, groups, seed=seed)[groups[0].name]
        squares.append(changes.sum(1).square().sum())
    (replayed,) = replay.batches
    with torch.no_grad():
        dense = replayed.last_hidden(LLAVA, whole=True)
        with watching(LLAVA, groups[0], lambda x, *_: (1 - step) * x):
            moved = replayed.last_hidden(LLAVA, whole=True)
        one, other = (
            replay.head(LLAVA, replayed.counted(hidden)).log_softmax(-1).double()
            for hidden in (dense, moved)
        )
    kl = float((one.exp() * (one - other)).sum())
    assert kl / step**2 == pytest.approx(float(torch.stack(squares).mean()) / 2, rel=0.35)


def test_a_layer_that_nothing_reads_is_worthless():
    """LLaVA reads the features below its last vision layer, so that layer goes first."""
    inputs = batch("llava", labels=True)
    allocator = Sensitivity(
        pruning_ratio=0.2, towers=ALL, effort="fisher", bounds=Bounds(drop="blocks")
    )
    plan = allocator.plan(LLAVA, calibration=[inputs])
    assert plan.towers == ALL and 0.2 <= plan.pruning_ratio < 0.21
    kept = plan.keep_counts
    assert kept["vision.1.attention"] == kept["vision.1.ffn"] == 0 and kept["projector.0.ffn"]
    small = prune(LLAVA, plan)
    assert len(small.model.vision_tower.encoder.layers) == 2  # features are read by number
    with masked(LLAVA, plan):
        expected = logits(LLAVA, inputs)
    assert torch.allclose(logits(small, inputs), expected, atol=1e-4)


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_scores_the_vision_tower_or_says_that_it_cannot(name):
    groups, data = find_groups(LLAVA, SEEING), [batch("llava", labels=True)]
    if SCORERS[name] is VisualSensitivity:
        with pytest.raises(UnsupportedModelError, match="the towers language only"):
            VisualSensitivity()(LLAVA, data, groups=groups)
        return
    scores = SCORERS[name]()(LLAVA, data, groups=groups)
    assert all(float(scores[g.name].std()) > 0 for g in groups if not g.name.startswith("vision.1"))


@settings(max_examples=15, deadline=None)
@given(st.floats(0, 0.7), st.sampled_from(["none", "blocks", "layers"]))
def test_a_projector_is_never_dropped(ratio, drop):
    groups = find_groups(LLAVA, ALL)
    counts = keep_counts(groups, [0.0] * (len(groups) - 1) + [-30.0], ratio, Bounds(drop=drop))
    assert counts[-1] >= 1


def test_a_plan_that_drops_a_projector_is_refused():
    model = FAMILIES["qwen3_vl"].build()  # it has one for every depth that it reads
    groups = find_groups(model, ("projector",))
    plan = plan_from_counts(groups, *half(groups, dropped=("projector.1.ffn",)))
    with pytest.raises(PlanError, match=r"drops projector\.1\.ffn, without which"):
        prune(model, plan)


def test_answers_and_likelihoods_see_what_the_vision_tower_lost():
    inputs = batch("llava", labels=True)
    plan = Uniform(pruning_ratio=0.4, scorer=Magnitude(), towers=SEEING).plan(LLAVA)
    small = prune(LLAVA, plan)
    last = (inputs["labels"] != -100).int().argmax(1)
    expected = logits(small, {k: v for k, v in inputs.items() if k != "labels"})
    answers = AnswerLogits(LLAVA, [inputs], whole=True)(small)
    assert torch.allclose(answers, expected[torch.arange(2), (last - 1).clamp_min(0)], atol=1e-5)
    likelihood = AnswerLikelihood(LLAVA, [inputs], whole=True)(small)
    with torch.no_grad():
        loss = small(**{k: v[:1] for k, v in inputs.items()}).loss
    assert float(likelihood[0]) == pytest.approx(-float(loss), abs=1e-4)


def test_the_planner_plans_for_all_towers_and_says_so(tmp_path):
    options = dict(pruning_ratio=0.3, effort="fisher", towers=ALL, cache=None)
    planner = HiPPPlanner(Preference(1, 1, 1), **options)
    plan = planner.plan(LLAVA, calibration=[batch("llava", labels=True)])
    assert plan.towers == ALL
    planner.save(tmp_path / "planner")
    loaded = HiPPPlanner.load(tmp_path / "planner")
    assert loaded.towers == ALL and loaded.plan(LLAVA) == plan

    class Frozen:
        towers = ("language",)

        def __call__(self, model):
            return {"utility": 0.0, "robustness": 0.0}

    with pytest.raises(DataError, match=r"make it with towers=\('language', 'vision'"):
        planner.fit(LLAVA, Frozen(), progress=False)


def test_signals_tell_the_towers_apart():
    groups = find_groups(LLAVA, ALL)
    where = depths(groups)
    assert where[:2].tolist() == [0, 0] and where[4] == 1 and where[6] == -1 and where[-1] == 0
    signals = measure_signals(LLAVA, [batch("llava", labels=True)], groups=groups, effort="fisher")
    assert float(signals.visual_rank[6:].abs().max()) == 0 < float(signals.visual[:6].max())


def test_flops_count_the_tokens_that_pass():
    groups = find_groups(LLAVA, ALL)
    assert {g.picture_tokens for g in groups if g.tower != "language"} == {16}
    cost = cost_of(groups, "flops", tokens=100)
    widths = [g.width for g in groups]
    for i, tokens in ((1, 100), (7, 16), (10, 16)):
        less = [w - (j == i) for j, w in enumerate(widths)]
        assert cost(widths) - cost(less) == tokens * groups[i].unit_flops


def test_padded_for_stock_transformers_and_named_by_check_serving(tmp_path):
    inputs = batch("llava")
    groups = find_groups(LLAVA, ALL)
    small = prune(LLAVA, plan_from_counts(groups, *half(groups)))
    for model, folder in ((small, "small"), (pad_to_uniform(small), "wide")):
        with pytest.warns(UserWarning, match="no processor"):
            save_pruned(model, tmp_path / folder)
    stock = type(LLAVA).from_pretrained(tmp_path / "wide").eval()
    assert torch.allclose(logits(stock, inputs), logits(small, inputs), atol=1e-4)
    for folder, pruned in (("small", True), ("wide", False)):
        verdicts = {v.runtime: " ".join(v.reasons) for v in check_serving(tmp_path / folder)}
        assert ("vision tower and projector was pruned" in verdicts["vllm"]) == pruned
        assert ("vision tower and projector" in verdicts["transformers"]) == pruned
        assert not verdicts["hipp-ext"]


def test_uniform_plans_of_all_towers_are_loaded_by_stock_transformers(tmp_path):
    bounds = Bounds(shape="uniform")
    plan = Uniform(pruning_ratio=0.3, scorer=Magnitude(), bounds=bounds, towers=ALL).plan(LLAVA)
    assert plan.keep_counts["vision.0.ffn"] == plan.keep_counts["vision.1.ffn"] < 52
    assert plan.keep_counts["projector.0.ffn"] == 40  # no configuration names its width
    small = prune(LLAVA, plan)
    assert small.config.vision_config.intermediate_size == plan.keep_counts["vision.0.ffn"]
    small.save_pretrained(tmp_path / "stock")
    stock = type(LLAVA).from_pretrained(tmp_path / "stock").eval()
    inputs = batch("llava")
    assert torch.equal(logits(stock, inputs), logits(small, inputs))


class Paired(nn.Module):
    """A projector whose channels are multiplied in pairs: none can go alone."""

    def __init__(self, projector):
        super().__init__()
        self.linear_1, self.linear_2 = projector.linear_1, projector.linear_2

    def forward(self, features):
        hidden = self.linear_1(features)
        return self.linear_2(hidden * hidden.flip(-1))


def test_a_projector_that_is_something_else_is_refused():
    model = build("llava")
    model.model.multi_modal_projector = Paired(model.model.multi_modal_projector)
    plan = plan_from_counts(*(lambda g: (g, *half(g)))(find_groups(model, ("projector",))))
    with pytest.raises(UnsupportedModelError, match=r"features of a picture differ.*\(Paired\)"):
        prune(model, plan)


def test_what_cannot_be_asked_for():
    with pytest.raises(BudgetError, match="one or several of language, vision, projector"):
        find_groups(LLAVA, ("sound",))
    with pytest.raises(BudgetError, match="each once"):
        Uniform(pruning_ratio=0.3, towers=("vision", "vision"))
    with pytest.raises(PlanError, match="expected some of language, vision, projector"):
        read_towers("language,eyes")
    with pytest.raises(UnsupportedModelError, match="has no projector with units"):
        find_groups(build("smolvlm"), ("projector",))
    assert read_towers("language, vision") == ("language", "vision")


def test_rows_of_pictures():
    ids = torch.tensor([[1, 5, 5, 9], [1, 9, 9, 9], [5, 5, 9, 9]])
    inputs = {"input_ids": ids, "pixel_values": torch.zeros(2, 3, 32, 32)}
    assert picture_rows(LLAVA, inputs, torch.Size([2, 3, 7])).tolist() == [0, 0, 0, 2, 2, 2]
    uneven = inputs | {"input_ids": torch.tensor([[5, 5, 5], [5, 9, 9]])}
    packed = uneven | {"image_grid_thw": torch.ones(2, 3)}
    assert picture_rows(LLAVA, packed, torch.Size([8, 7])).tolist() == [0] * 6 + [1] * 2
    assert picture_rows(LLAVA, uneven | {"image_sizes": 0}, torch.Size([2, 4, 7])) is None
