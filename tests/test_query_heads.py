"""Query heads as units: what they own, how they are ranked, planned and scored."""

import json
from typing import get_args

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, build
from plans import logits, meets, random_scores
from test_families import text_model

from hipp_ext import HiPPPlanner, Preference, PruningPlan, masked, prune
from hipp_ext.allocators import ALLOCATORS, GlobalThreshold, Sensitivity, Uniform
from hipp_ext.budget import Bounds, keep_counts, largest_ratio
from hipp_ext.calibration import Calibration
from hipp_ext.cli import options
from hipp_ext.errors import BudgetError, PlanError, UnsupportedModelError
from hipp_ext.groups import AttentionUnit, find_groups, query_groups
from hipp_ext.plan import PlanGroup
from hipp_ext.planner.cost import cost_of
from hipp_ext.planner.signal_cache import cached_signals
from hipp_ext.scorers import MRS, SCORERS, Magnitude, VisualSensitivity
from hipp_ext.scorers.group_loss import removal_mask
from hipp_ext.sensitivity.curves import at_levels, loss_curve
from hipp_ext.sensitivity.efforts import measure_sensitivity
from hipp_ext.sensitivity.fisher import fisher_curve
from hipp_ext.sensitivity.measured import Point, measure_points
from hipp_ext.sensitivity.replay import CalibrationReplay
from hipp_ext.units import plan_from_counts, top_units, unit_order

GQA = ("llama", "llava_gqa", "llava_mqa", "qwen2_5_vl", "qwen3")
MODELS = {name: build(name) for name in GQA}
GROUPS = {name: find_groups(model, attention_unit="query") for name, model in MODELS.items()}


def shares(group, kept) -> list[int]:
    """How many units of each section are kept."""
    size = group.width // group.sections
    return [sum(unit // size == section for unit in kept) for section in range(group.sections)]


@pytest.mark.parametrize("name", GQA)
def test_a_unit_is_a_query_head_and_keys_and_values_belong_to_nobody(name):
    model, groups = MODELS[name], GROUPS[name]
    config = model.config.get_text_config()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    for kv, g in zip(find_groups(model), groups, strict=True):
        if g.place == "ffn":
            assert g == kv and g.sections == 1
            continue
        block = model.get_submodule(g.block)
        assert g.name == f"language.{g.layer}.query_heads"
        assert (g.width, g.sections) == (heads, kv_heads) and kv.width == kv_heads
        assert g.producers == (f"{g.block}.q_proj",) and g.consumer == kv.consumer
        assert [p.size for p in g.produced] == [block.head_dim] == [g.columns]
        owned = sum(p.numel() for p in block.q_proj.parameters()) + block.o_proj.weight.numel()
        assert g.parameters == owned
        # With every query head of a group gone, only its key and value are left of the group.
        both = [block.k_proj, block.v_proj]
        left = sum(p.numel() for layer in both for p in layer.parameters())
        assert kv.parameters == g.parameters + left
        assert g.width * g.context_flops(11) == kv.width * kv.context_flops(11)
        assert g.multiple(1) == g.sections
        assert g.multiple(4 * g.columns) % 4 == 0 == g.multiple(4 * g.columns) % g.sections
    assert query_groups(model, ("language",)) == tuple(g for g in groups if g.place == "attention")


def test_without_shared_keys_both_units_are_kv_groups():
    model = build("llava")
    assert find_groups(model, attention_unit="query") == find_groups(model)
    assert [g.sections for g in query_groups(model, ("language",))] == [4, 4, 4]


def test_an_unknown_unit_is_refused():
    for action in (
        lambda: find_groups(MODELS["llama"], attention_unit="heads"),  # type: ignore[arg-type]
        lambda: Uniform(pruning_ratio=0.3, attention_unit="heads"),  # type: ignore[arg-type]
        lambda: HiPPPlanner(Preference(1, 1, 1), attention_unit="heads"),  # type: ignore[arg-type]
    ):
        with pytest.raises(BudgetError, match="attention_unit='heads': one of kv, query is needed"):
            action()


# Ranking


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_every_section_keeps_its_best(sections, size, data):
    scores = torch.tensor(
        data.draw(st.lists(st.floats(-5, 5), min_size=sections * size, max_size=sections * size))
    )
    order = unit_order(scores, sections)
    assert sorted(order.tolist()) == list(range(len(scores)))
    ranks = data.draw(st.integers(0, size))
    kept = set(top_units(scores, ranks * sections, sections))
    assert kept == set(order[: ranks * sections].tolist())
    for section in scores.view(sections, size):
        first = int((section.data_ptr() - scores.data_ptr()) / scores.element_size())
        own = [u - first for u in kept if first <= u < first + size]
        assert own == sorted(own) or set(own)  # which ones, not their order
        assert sorted(own) == list(top_units(section, ranks))
    assert list(top_units(scores, ranks * sections, sections)) == sorted(kept)
    if sections == 1:
        assert torch.equal(order, torch.argsort(scores, descending=True, stable=True))


def test_a_curve_removes_the_lowest_of_every_section():
    contributions = torch.tensor([[1.0, 2, 4, 8, 16, 32]])
    scores = torch.tensor([3.0, 1, 2, 1, 2, 3])  # two sections: they lose 1, 2, 0 and 3, 4, 5
    curve = fisher_curve(contributions, scores, 2)
    assert curve.tolist() == [[0, 10**2 / 2, 30**2 / 2, 63**2 / 2]]


def test_a_removed_half_is_half_of_every_section():
    scores = torch.tensor([1.0, 2, 3, 4, 9, 8, 7, 6])
    assert removal_mask(scores, 0.5, 2).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert removal_mask(scores, 0.5).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ["llama", "llava_gqa"])
@torch.no_grad()
def test_sensitivity_is_that_of_plans_that_keep_the_same_of_every_section(name):
    model, groups = MODELS[name], GROUPS[name]
    calibration = Calibration.of(model, [batch(name, size=3)])
    scores = random_scores(groups)
    found = measure_sensitivity(model, calibration, groups, scores, effort="measured")
    for i, g in enumerate(groups):
        if g.place == "ffn":
            continue
        ranks = g.width // g.sections
        points = [Point(group=g, removed=k * g.sections) for k in range(1, ranks + 1)]
        replay = CalibrationReplay(model, calibration)
        kl = measure_points(model, replay, points, scores, replay.batches)
        for point, value in zip(points, kl, strict=True):
            counts = [h.width - point.removed * (h == g) for h in groups]
            plan = plan_from_counts(groups, counts, scores)
            dense = model(**batch(name, size=3)).logits.log_softmax(-1)
            with masked(model, plan):
                pruned = model(**batch(name, size=3)).logits.log_softmax(-1)
            each = (dense.exp() * (dense - pruned)).sum(-1)
            positions = replay.batches[0]
            expected = each[positions.rows, positions.places].mean()
            assert torch.allclose(value, expected, rtol=1e-3, atol=1e-5)
        curve = loss_curve(torch.ones(ranks + 1), {k + 1: float(kl[k, 0]) for k in range(ranks)})
        if ranks == 2:  # both removals were measured
            assert torch.allclose(found[0, i], at_levels(curve), rtol=1e-3, atol=1e-6)


# Plans


def entry(kept, width=6, sections=3, **other):
    return PlanGroup(
        tower="language",
        layer=0,
        kind="query_heads",
        width=width,
        kept=kept,
        unit_parameters=7,
        sections=sections,
        **other,
    )


def test_a_plan_keeps_the_same_number_of_every_section():
    entry((0, 3, 4)), entry(()), entry(tuple(range(6)))
    with pytest.raises(PlanError, match=r"each of the 3 sections of 2 units.*keep \[2, 1, 0\]"):
        entry((0, 1, 2))
    with pytest.raises(PlanError, match="6 units cannot be divided into 4 sections"):
        entry((), sections=4)
    with pytest.raises(PlanError, match="cannot be divided into 0 sections"):
        entry((), sections=0)
    with pytest.raises(PlanError, match="sections=1.5: a whole number is needed"):
        entry((), sections=1.5)


def test_plans_say_their_unit_in_json(tmp_path):
    groups = GROUPS["llama"]
    plan = plan_from_counts(groups, [g.sections for g in groups], random_scores(groups))
    assert plan.attention_unit == "query"
    assert PruningPlan.from_json(plan.to_json()) == plan
    first, second = json.loads(plan.to_json())["groups"][:2]
    assert (first["kind"], first["sections"], first["keep"]) == ("query_heads", 3, 3)
    assert "sections" not in second
    edited = json.loads(plan.to_json())
    edited["groups"][0] |= {"kept": "0-2"}
    with pytest.raises(PlanError, match=r"must keep the same number; they keep \[2, 1, 0\]"):
        PruningPlan.from_json(json.dumps(edited))
    edited["groups"][0] |= {"sections": 0}
    with pytest.raises(PlanError, match="sections: Input should be greater than or equal to 1"):
        PruningPlan.from_json(json.dumps(edited))
    kv = find_groups(MODELS["llama"])
    plan = plan_from_counts(kv, [1] * len(kv), random_scores(kv))
    assert plan.attention_unit == "kv" and "sections" not in plan.to_json()


def test_counts_that_sections_cannot_share_are_refused():
    groups = GROUPS["llama"]
    counts = [g.width for g in groups]
    counts[2] = 4
    with pytest.raises(PlanError, match=r"language\.1\.query_heads cannot keep 4 of 6 units.*of 3"):
        plan_from_counts(groups, counts, random_scores(groups))


def test_a_plan_of_another_model_says_its_sections():
    groups = GROUPS["qwen2_5_vl"]
    plan = plan_from_counts(groups, [g.width for g in groups], random_scores(groups))
    with pytest.raises(PlanError, match=r"plan 4 units in 2 sections of 810 parameters, model"):
        prune(MODELS["llama"], plan)


# Budgets, allocators, planner


@pytest.mark.parametrize("bounds", [Bounds(), Bounds(round_to=24), Bounds(drop="blocks")], ids=str)
@pytest.mark.parametrize("name", ["llama", "llava_gqa", "llava_mqa"])
def test_budgets_are_exact_and_steps_are_whole_ranks(name, bounds):
    groups = GROUPS[name]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        allocation = torch.randn(len(groups), generator=generator).tolist()
        ratio = seed / 20 * largest_ratio(groups, bounds)
        counts = keep_counts(groups, allocation, ratio, bounds)
        if bounds.drop == "none":
            assert meets(groups, counts, ratio, bounds)
        for g, k in zip(groups, counts, strict=True):
            assert k % g.sections == 0 and 0 <= k <= g.width
            assert k * g.columns % bounds.round_to == 0 or k == g.width


@pytest.mark.parametrize("name", ALLOCATORS)
def test_every_allocator_plans_query_heads(name):
    model = MODELS["llava_gqa"]
    kind, data = ALLOCATORS[name], [batch("llava_gqa", size=3)]
    plan = kind(pruning_ratio=0.3, attention_unit="query").plan(model, calibration=data)
    groups = GROUPS["llava_gqa"]
    assert meets(groups, [e.keep for e in plan.groups], 0.3, Bounds())
    for g, e in zip(groups, plan.groups, strict=True):
        assert e.sections == g.sections and len(set(shares(g, e.kept))) == 1
    with masked(model, plan):
        expected = logits(model, data[0])
    assert torch.allclose(logits(prune(model, plan), data[0]), expected, atol=1e-5)


def test_a_threshold_ranks_units_within_their_section():
    groups = [g for g in GROUPS["llama"] if g.place == "attention"]
    scores = {g.name: torch.tensor([9.0, 8, 1, 1, 1, 1]) for g in groups}  # 3 sections of 2
    scores[groups[1].name] = torch.tensor([4.0, 3, 4, 3, 4, 3])
    counts = GlobalThreshold(pruning_ratio=1 / 6).keep_counts(groups, scores, None)
    # Of the second ranks (8, 1, 1), (3, 3, 3) and (8, 1, 1), relative to their means, the least.
    assert counts == (6, 3, 6)


def test_flops_of_a_plan_are_those_of_its_heads():
    for name in ("llama", "llava_gqa"):
        kv, query = find_groups(MODELS[name]), GROUPS[name]
        dense = [cost_of(g, "flops")([h.width for h in g]) for g in (kv, query)]
        block = MODELS[name].get_submodule(query[0].block)
        projections = sum(2 * p.numel() for p in (block.k_proj.weight, block.v_proj.weight))
        assert dense[0] - dense[1] == 640 * 3 * projections  # of a typical prompt


def test_a_planner_measures_the_unit_it_is_asked_for(tmp_path):
    model, data = MODELS["llava_gqa"], [batch("llava_gqa", size=3, labels=True)]
    options = {"pruning_ratio": 0.3, "effort": "fisher", "cache": tmp_path / "cache"}
    planner = HiPPPlanner(Preference(1, 1, 1), attention_unit="query", **options)
    plan = planner.plan(model, calibration=data)
    assert plan.attention_unit == "query" and planner.signals.groups == GROUPS["llava_gqa"]
    assert meets(GROUPS["llava_gqa"], [e.keep for e in plan.groups], 0.3, Bounds())
    other = HiPPPlanner(Preference(1, 1, 1), **options).plan(model, calibration=data)
    assert other.attention_unit == "kv" and len(list((tmp_path / "cache").iterdir())) == 2
    planner.save(tmp_path / "planner")
    loaded = HiPPPlanner.load(tmp_path / "planner")
    assert loaded.attention_unit == "query" and loaded.plan(model) == plan
    loaded.attention_unit = "kv"  # signals of the other unit are not used
    loaded.cache = tmp_path / "cache"
    assert loaded.plan(model, calibration=data) == other
    read = []
    again = {"groups": GROUPS["llava_gqa"], "effort": "fisher", "log": read.append}
    signals = cached_signals(model, data, tmp_path / "cache", **again)
    assert "as measured before" in read[0] and signals.ranking == planner.signals.ranking
    assert torch.isfinite(signals.state).all() and float(signals.visual.min()) > 0


# Scores


@pytest.mark.parametrize("name", SCORERS)
def test_permuting_the_heads_of_a_kv_group_permutes_their_scores(name):
    scorer = MRS(attack_steps=2) if name == "mrs" else SCORERS[name]()
    model, inputs = build("llava_gqa"), batch("llava_gqa", labels=True)
    groups = GROUPS["llava_gqa"]
    scores, order = scorer(model, [inputs], groups=groups), {}
    for g in groups:
        assert scores[g.name].shape == (g.width,) and scores[g.name].std() > 0
        size = g.width // g.sections
        order[g.name] = torch.cat([s * size + torch.randperm(size) for s in range(g.sections)])
    with torch.no_grad():
        for g in groups:
            for part in g.owns:
                weight = model.get_parameter(part.parameter)
                units = weight.unflatten(part.dim, (g.width, part.size))
                sorted_units = units.index_select(part.dim, order[g.name])
                weight.copy_(sorted_units.flatten(part.dim, part.dim + 1))
    for group, permuted in scorer(model, [inputs], groups=groups).items():
        assert torch.allclose(permuted, scores[group][order[group]], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in SCORERS if n not in ("magnitude", "mrs", "taylor")])
def test_scores_of_heads_make_up_those_of_their_kv_group(name):
    """Sums or means over heads; what keys and values add, and gates in common, are left out."""
    scorer, model, data = SCORERS[name](), MODELS["llava_gqa"], [batch("llava_gqa", labels=True)]
    of_kv, of_heads = scorer(model, data), scorer(model, data, groups=GROUPS["llava_gqa"])
    for kv, g in zip(find_groups(model), GROUPS["llava_gqa"], strict=True):
        if g.place == "attention":
            heads = of_heads[g.name].view(g.sections, -1)
            together = heads.mean(1) if name == "flap" else heads.sum(1)
            assert torch.allclose(of_kv[kv.name], together, rtol=1e-3, atol=1e-6)


def test_magnitude_is_the_norm_of_rows_and_columns():
    model, g = MODELS["llama"], GROUPS["llama"][0]
    block = model.get_submodule(g.block)
    rows = block.q_proj.weight.detach()[g.columns : 2 * g.columns]
    columns = block.o_proj.weight.detach()[:, g.columns : 2 * g.columns]
    expected = (rows.square().sum() + columns.square().sum()).sqrt()
    found = Magnitude()(model, groups=GROUPS["llama"])[g.name]
    assert torch.allclose(found[1], expected, rtol=1e-5)


# Verification


class Tiled(transformers.models.llama.modeling_llama.LlamaAttention):
    """Query head h reads key head h modulo their number, other than in transformers."""

    def forward(self, hidden_states, *args, **kwargs):
        repeat, dim = self.num_key_value_groups, self.head_dim
        kv = self.k_proj.weight.shape[0] // dim
        order = torch.arange(kv * repeat).view(kv, repeat).T.flatten()
        whole = self.q_proj.weight.data
        self.q_proj.weight.data = whole.view(kv * repeat, dim, -1)[order.argsort()].flatten(0, 1)
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self.q_proj.weight.data = whole


def test_heads_of_another_order_are_refused():
    model = text_model("Llama")
    groups = find_groups(model, attention_unit="query")
    plan = plan_from_counts(groups, [g.sections for g in groups], random_scores(groups))
    for layer in model.model.layers:
        layer.self_attn.__class__ = Tiled
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match="can be pruned, and are not"):
        prune(model, plan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert find_groups(model, attention_unit="query") == groups


def test_each_unit_is_verified_once():
    model, passes = text_model("Llama"), []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    for unit, expected in (("kv", 3), ("query", 6), ("kv", 6), ("query", 6)):
        groups = find_groups(model, attention_unit=unit)
        prune(model, plan_from_counts(groups, [g.width for g in groups], random_scores(groups)))
        assert len(passes) == expected


def test_visual_sensitivity_and_efforts_take_query_heads():
    model, data = MODELS["qwen2_5_vl"], [batch("qwen2_5_vl", size=3)]
    flow = VisualSensitivity()(model, data, groups=GROUPS["qwen2_5_vl"])
    assert all(float(flow[g.name].min()) > 0 for g in GROUPS["qwen2_5_vl"])
    for effort in ("fisher", "anchored"):
        allocator = Sensitivity(pruning_ratio=0.4, effort=effort, attention_unit="query")
        plan = allocator.plan(model, calibration=data)
        assert meets(GROUPS["qwen2_5_vl"], [e.keep for e in plan.groups], 0.4, Bounds())


def test_the_commands_offer_the_units_there_are():
    assert get_args(options.AttentionUnit) == get_args(AttentionUnit)
