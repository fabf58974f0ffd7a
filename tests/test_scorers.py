"""Scorers: their contract for every model, and each against an independent computation of its
formula.
"""

import pytest
import torch
from models import IMAGE_TOKEN, IMAGE_TOKENS, VARIED, batch, build
from plans import random_plan

from hipp_ext import masked
from hipp_ext.calibration import TASKS
from hipp_ext.errors import CalibrationError, UnsupportedModelError
from hipp_ext.families import norm_before
from hipp_ext.groups import find_groups, tower_layers
from hipp_ext.scorers import FLAP, MRS, Magnitude, SynFlow, Taylor, VisualSensitivity, WandaSP
from hipp_ext.scorers import SCORERS as REGISTRY
from hipp_ext.scorers.synflow import _gain

SCORERS = [MRS(attack_steps=2) if kind is MRS else kind() for kind in REGISTRY.values()]


def left_padded(name: str, rows: int = 2, pad: int = 3) -> dict:
    """The same rows as batch(name), with `pad` tokens of padding before the first row."""
    inputs = batch(name, rows, labels=True)
    zeros = torch.zeros(rows, pad, dtype=torch.long)
    return inputs | {
        "input_ids": torch.cat([zeros, inputs["input_ids"]], 1),
        "attention_mask": torch.cat([zeros, inputs["attention_mask"]], 1),
        "labels": torch.cat([zeros - 100, inputs["labels"]], 1),
    }


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize("scorer", SCORERS, ids=lambda s: s.name)
def test_contract(scorer, name):
    model, inputs = build(name), batch(name, labels=True)
    if scorer.name == "VisualSensitivity" and name not in IMAGE_TOKENS:
        with pytest.raises(UnsupportedModelError, match="has no image token"):
            scorer(model, [inputs])
        return
    model.train()
    model.get_input_embeddings().requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {k: p.requires_grad for k, p in model.named_parameters()}
    implementation = model.config.get_text_config()._attn_implementation
    scores = scorer(model, [inputs])
    for g in find_groups(model):
        assert scores[g.name].shape == (g.width,) and scores[g.name].dtype == torch.float32
        assert (scores[g.name] >= 0).all() and (g.width == 1 or scores[g.name].std() > 0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {k: p.requires_grad for k, p in model.named_parameters()} == flags
    assert all(m.training for m in model.modules()) and all(
        p.grad is None for p in model.parameters()
    )
    assert model.config.get_text_config()._attn_implementation == implementation
    assert not any(
        m._forward_hooks or m._forward_pre_hooks for m in tower_layers(model, "language").modules()
    )


@pytest.mark.parametrize("name", ["llava_gqa", "qwen2_5_vl", "llama"])
@pytest.mark.parametrize("scorer", [WandaSP(), FLAP(), VisualSensitivity()], ids=lambda s: s.name)
def test_padding_does_not_count(scorer, name):
    if scorer.name == "VisualSensitivity" and name == "llama":
        return
    model = build(name)
    plain, padded = scorer(model, [batch(name)]), scorer(model, [left_padded(name)])
    for key in plain:
        assert torch.allclose(plain[key], padded[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda s: s.name)
def test_permuting_units_permutes_scores(scorer):
    model, inputs = build("llava"), batch("llava", labels=True)
    scores = scorer(model, [inputs])
    order = {g.name: torch.randperm(g.width) for g in find_groups(model)}
    with torch.no_grad():
        for g in find_groups(model):
            for part in g.produced:
                weight = model.get_submodule(part.layer).weight
                weight.copy_(weight.unflatten(0, (g.width, part.size))[order[g.name]].flatten(0, 1))
            weight = model.get_submodule(g.consumer).weight
            weight.copy_(weight.unflatten(1, (g.width, g.columns))[:, order[g.name]].flatten(1, 2))
    for name, permuted in scorer(model, [inputs]).items():
        assert torch.allclose(permuted, scores[name][order[name]], rtol=1e-3, atol=1e-6)


def consumer_inputs(model, group, inputs) -> torch.Tensor:
    seen = []
    hook = model.get_submodule(group.consumer).register_forward_pre_hook(
        lambda m, a: seen.append(a[0])
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0].flatten(0, 1).double()


@pytest.mark.parametrize("index", [0, 1])
def test_wanda_sp_and_flap_formulas(index):
    model, inputs = build("llava_gqa"), batch("llava_gqa")
    g = find_groups(model)[index]
    x, w = (
        consumer_inputs(model, g, inputs),
        model.get_submodule(g.consumer).weight.detach().double(),
    )
    wanda = (w.abs() * x.norm(dim=0)).mean(0).view(g.width, -1).sum(1)
    assert torch.allclose(WandaSP()(model, [inputs])[g.name].double(), wanda, rtol=1e-4)
    flap = (x.var(0, unbiased=False) * w.square().sum(0)).view(g.width, -1).mean(1)
    assert torch.allclose(FLAP()(model, [inputs])[g.name].double(), flap, rtol=1e-4)


@pytest.mark.parametrize("index", [2, 3])
def test_taylor_is_the_derivative_of_a_gate(index):
    model, inputs = build("llava_gqa").double(), batch("llava_gqa", labels=True)
    g = find_groups(model)[index]
    gate = torch.ones(g.width, dtype=torch.double, requires_grad=True)
    hook = model.get_submodule(g.consumer).register_forward_pre_hook(
        lambda m, a: (a[0] * gate.repeat_interleave(g.columns),)
    )
    expected = torch.autograd.grad(model(**inputs).loss, gate)[0].abs()
    hook.remove()
    assert torch.allclose(
        Taylor()(model, [inputs])[g.name].double(), expected, rtol=1e-4, atol=1e-8
    )


def test_taylor_needs_labels():
    with pytest.raises(
        CalibrationError, match="Taylor needs a loss: calibration batch 1 has no labels"
    ):
        Taylor()(build("llava"), [batch("llava", labels=True), batch("llava")])


def test_magnitude_is_the_norm_of_what_goes():
    model = build("llava_gqa")
    g = find_groups(model)[0]
    weight = {n: model.get_submodule(n).weight.detach() for n in (*g.producers, g.consumer)}
    parts = [weight[p.layer][p.size : 2 * p.size] for p in g.produced]
    parts.append(weight[g.consumer][:, g.columns : 2 * g.columns])
    expected = torch.cat([p.flatten() for p in parts]).norm()
    assert Magnitude()(model)[g.name][1] == pytest.approx(float(expected), rel=1e-5)


# Visual sensitivity


def eager_flow(model, inputs, group) -> torch.Tensor:
    """The definition, head by head and token by token, from eager attention weights."""
    model.set_attn_implementation(
        {"text_config": "eager"} if hasattr(model.config, "text_config") else "eager"
    )
    block = tower_layers(model, "language")[group.layer].self_attn
    seen = {}
    hooks = [
        block.v_proj.register_forward_hook(lambda m, a, o: seen.update(v=o)),
        tower_layers(model, "language")[group.layer].register_forward_pre_hook(
            lambda m, a, k: seen.update(h=a[0] if a else k["hidden_states"]), with_kwargs=True
        ),
    ]
    with torch.no_grad():
        attention = model(**inputs, output_attentions=True, use_cache=False).attentions[group.layer]
    for hook in hooks:
        hook.remove()
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    head_dim, repeat = block.head_dim, group.produced[0].size // block.head_dim
    total, count = torch.zeros(group.width), 0
    for b in range(len(ids)):
        vision = (ids[b] == IMAGE_TOKEN).nonzero().flatten()
        for i in range(len(ids[b])):
            if not mask[b, i] or ids[b, i] == IMAGE_TOKEN or not len(vision) or i < vision[0]:
                continue
            count += 1
            for head in range(attention.shape[1]):
                kv = head // repeat
                value = seen["v"][b, :, kv * head_dim : (kv + 1) * head_dim]
                context = sum(attention[b, head, i, j] * value[j] for j in vision)
                out = (
                    block.o_proj.weight.detach()[:, head * head_dim : (head + 1) * head_dim]
                    @ context
                )
                total[kv] += out.norm() / seen["h"][b, i].norm()
    return total / count


@pytest.mark.parametrize("name", ["llava", "llava_gqa", "qwen2_5_vl"])
@pytest.mark.parametrize("padded", [False, True])
def test_visual_flow_equals_its_definition_on_eager_attention(name, padded):
    model, inputs = build(name), left_padded(name) if padded else batch(name)
    scores = VisualSensitivity()(model, [inputs])
    inputs.pop("labels", None)
    g = find_groups(model)[2]
    assert torch.allclose(scores[g.name], eager_flow(model, inputs, g), rtol=1e-3)


def test_visual_flow_with_right_padding():
    model, inputs = build("llava"), batch("llava")
    expected = VisualSensitivity()(model, [inputs])
    zeros = torch.zeros(2, 4, dtype=torch.long)
    for key in ("input_ids", "attention_mask"):
        inputs[key] = torch.cat([inputs[key], zeros], 1)
    for name, score in VisualSensitivity()(model, [inputs]).items():
        assert torch.allclose(score, expected[name], rtol=1e-4)


def test_several_images():
    model, one = build("llava"), batch("llava")
    ids = torch.cat([one["input_ids"], one["input_ids"]], 1)
    pixels = torch.randn(4, 3, 32, 32)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    scores = VisualSensitivity()(model, [inputs])
    g = find_groups(model)[0]
    assert torch.allclose(scores[g.name], eager_flow(model, inputs, g), rtol=1e-3)


def test_where_a_layer_attends_to_the_image_alone_all_of_its_output_is_visual_flow():
    model, inputs = build("mllama"), batch("mllama")
    inputs["cross_attention_mask"] = torch.ones(
        *inputs["input_ids"].shape, 1, 1, dtype=torch.long
    )  # as its processor gives it
    layer = tower_layers(model, "language")[1]
    block, seen = layer.cross_attn, {}
    hooks = [
        block.o_proj.register_forward_pre_hook(lambda m, a: seen.update(heads=a[0])),
        layer.register_forward_pre_hook(
            lambda m, a, k: seen.update(hidden=a[0] if a else k["hidden_states"]), with_kwargs=True
        ),
    ]
    with torch.no_grad():
        model(**inputs)
        for hook in hooks:
            hook.remove()
        text = (inputs["input_ids"] != IMAGE_TOKEN) & (
            (inputs["input_ids"] == IMAGE_TOKEN).cumsum(1) > 0
        )
        weight = block.o_proj.weight.view(32, 4, 8)  # output, query head, head_dim
        written = torch.einsum("bthd,ohd->btho", seen["heads"].unflatten(-1, (4, 8)), weight)
        relative = written.norm(dim=-1) / seen["hidden"].norm(dim=-1, keepdim=True)
        expected = (
            relative[text].mean(0).view(2, 2).sum(1) * layer.cross_attn_attn_gate.tanh().abs()
        )
    assert torch.allclose(
        VisualSensitivity()(model, [inputs])["language.1.attention"], expected, rtol=1e-4
    )


def test_without_an_image_visual_sensitivity_is_zero():
    inputs = {k: v for k, v in batch("llama").items()}
    for score in VisualSensitivity()(build("llava"), [inputs]).values():
        assert not score.any()


@pytest.mark.parametrize("name", ["llava", "granite_llava", "gemma3", "mllama"])
def test_drift_is_that_of_the_vision_tokens(name):
    model, inputs, norm = (
        build(name),
        batch("mllama" if name == "mllama" else "llava"),
        "post_attention_layernorm",
    )
    if name == "gemma3":
        inputs["token_type_ids"], norm = (
            (inputs["input_ids"] == IMAGE_TOKEN).long(),
            "pre_feedforward_layernorm",
        )
    layer = tower_layers(model, "language")[1]
    seen = {}
    hooks = [
        layer.register_forward_hook(
            lambda m, a, o: seen.update(after=o[0] if isinstance(o, tuple) else o)
        ),
        getattr(layer, norm).register_forward_pre_hook(lambda m, a: seen.update(before=a[0])),
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    where = inputs["input_ids"] == IMAGE_TOKEN
    drift = 1 - torch.cosine_similarity(seen["before"][where], seen["after"][where], dim=-1)
    score = VisualSensitivity()(model, [inputs])["language.1.ffn"]
    assert float(score.sum()) == pytest.approx(float(drift.mean()), rel=1e-4)


def test_sinks_do_not_count():
    model, inputs = build("llava"), batch("llava")
    scores = VisualSensitivity(sink_threshold=1.0)(
        model, [inputs]
    )  # every token has a component above its root mean square
    assert not scores["language.0.attention"].any() and scores["language.0.ffn"].any()


# SynFlow


def test_synflow_shares_are_what_is_lost_by_removal():
    """Removing units from the linearised network lowers its flow by exactly their shares."""
    model = build("llava_gqa").double()
    flow = SynFlow()(model)
    layers = tower_layers(model, "language")

    def total_flow(skip=None) -> float:
        x = torch.ones(40, dtype=torch.double)
        for i, layer in enumerate(layers):
            a, m = layer.self_attn, layer.mlp
            value = a.v_proj.weight.abs() @ (layer.input_layernorm.weight.abs() * x)
            value = value.view(2, 1, 6).expand(-1, 4, -1).reshape(2, -1).clone()
            if skip and skip[:2] == (i, "attention"):
                value[skip[2]] = 0
            x = x + a.o_proj.weight.abs() @ value.flatten()
            hidden = m.up_proj.weight.abs() @ (layer.post_attention_layernorm.weight.abs() * x)
            if skip and skip[:2] == (i, "ffn"):
                hidden = hidden.clone()
                hidden[skip[2]] = 0
            x = x + m.down_proj.weight.abs() @ hidden
        return float(x.sum())

    with torch.no_grad():
        dense = total_flow()
        for layer, kind, unit in [(0, "attention", 1), (1, "ffn", 7), (2, "ffn", 40)]:
            share = float(flow[f"language.{layer}.{kind}"][unit])
            assert share == pytest.approx(1 - total_flow((layer, kind, unit)) / dense, rel=1e-3)


def test_the_gain_of_a_norm_is_what_it_scales_by():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    weight = torch.randn(40)
    for norm, gain in (
        (LlamaRMSNorm(40), weight),
        (Gemma3RMSNorm(40), 1 + weight),
        (torch.nn.LayerNorm(40), weight),
    ):
        with torch.no_grad():
            norm.weight.copy_(weight)
            if isinstance(norm, torch.nn.LayerNorm):
                norm.bias.fill_(3.0)
            assert torch.allclose(_gain(norm, torch.ones(40)), gain.abs(), atol=1e-4)
    for norm in (None, torch.nn.LayerNorm(40, elementwise_affine=False)):
        assert torch.allclose(_gain(norm, torch.ones(40)), torch.ones(40), atol=1e-4)


def test_a_norm_behind_attention_is_not_taken_for_the_one_before_the_ffn():
    layer = torch.nn.Module()
    layer.post_attention_layernorm = torch.nn.LayerNorm(8)
    assert norm_before(layer, "ffn") is None
    layer.input_layernorm = torch.nn.LayerNorm(8)
    assert norm_before(layer, "ffn") is layer.post_attention_layernorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_synflow_cannot_overflow(dtype):
    from models import llava

    model = llava(layers=48)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(30.0)
    shares = SynFlow()(model.to(dtype))
    assert all(
        torch.isfinite(s).all() and 0 < float(s.double().sum()) < 1.001 for s in shares.values()
    )


def test_synflow_is_that_of_the_weights_under_a_mask_too():
    model = build("llava")
    flow = SynFlow()(model)
    with masked(model, random_plan(model)):
        assert SynFlow()(model)["language.0.ffn"].equal(flow["language.0.ffn"])


# Calibration


# Calibration


def test_calibration_that_does_not_fit_is_refused():
    model, inputs = build("llava"), batch("llava")
    with pytest.raises(CalibrationError, match="holds no batches"):
        WandaSP()(model, [])
    with pytest.raises(
        CalibrationError, match=r"batch 0 needs input_ids .* it has \['pixel_values'\]"
    ):
        WandaSP()(model, [{"pixel_values": inputs["pixel_values"]}])
    with pytest.raises(CalibrationError, match="token ids from 1 to 9999; the model has 97"):
        WandaSP()(
            model,
            [
                inputs
                | {
                    "input_ids": inputs["input_ids"]
                    .clamp(max=9999)
                    .index_fill(1, torch.tensor([3]), 9999)
                }
            ],
        )
    with pytest.raises(CalibrationError, match="32 image tokens .* and no pixel_values"):
        WandaSP()(model, [{k: v for k, v in inputs.items() if k != "pixel_values"}])
    with pytest.raises(CalibrationError, match="0 image tokens .* and pixel_values"):
        WandaSP()(model, [inputs | {"input_ids": inputs["input_ids"].clamp_min(10)}])
    with pytest.raises(
        CalibrationError, match="has pixel_values, but LlamaForCausalLM has no image token"
    ):
        WandaSP()(build("llama"), [inputs])
    with pytest.raises(
        CalibrationError, match=r"No calibration data.*was not loaded from a folder"
    ):
        WandaSP()(model)


OF_ANOTHER_SHAPE = {
    "labels of other tokens": (
        {"labels": torch.ones(2, 3, dtype=torch.long)},
        r"needs labels of shape \(2, 8\).*got shape",
    ),
    "labels in words": ({"labels": "yes"}, r"needs labels of shape \(2, 8\).*got a str"),
    "labels of another vocabulary": (
        {"labels": torch.full((2, 8), 200)},
        "labels from 200 to 200; they are token ids",
    ),
    "labels of another mark": (
        {"labels": torch.full((2, 8), -1)},
        "or -100 where nothing is to be answered",
    ),
    "labels between numbers": (
        {"labels": torch.ones(2, 8)},
        "needs labels of whole numbers, not of torch.float32",
    ),
    "tokens between numbers": ({"input_ids": torch.ones(2, 8)}, "needs input_ids of whole numbers"),
    "a mask of other tokens": (
        {"attention_mask": torch.ones(2, 3)},
        r"needs attention_mask of shape \(2, 8\)",
    ),
    "a row of padding alone": (
        {"attention_mask": torch.tensor([[1] * 8, [0] * 8])},
        "has a row whose attention_mask",
    ),
}


@pytest.mark.parametrize("name", OF_ANOTHER_SHAPE)
def test_what_comes_one_for_each_token_is_as_long_as_the_tokens(name):
    changes, message = OF_ANOTHER_SHAPE[name]
    with pytest.raises(CalibrationError, match=f"batch 1 (needs |has |holds )?.*{message}"):
        WandaSP()(build("llama"), [batch("llama"), batch("llama") | changes])


@pytest.mark.parametrize("scorer", [Taylor(), MRS(attack_steps=0)])
def test_a_loss_needs_labels_that_count(scorer):
    inputs = batch("llama", labels=True)
    with pytest.raises(
        CalibrationError, match="needs a loss: all labels of calibration batch 0 are -100"
    ):
        scorer(build("llama"), [inputs | {"labels": torch.full_like(inputs["labels"], -100)}])
    with pytest.raises(CalibrationError, match="needs a loss: calibration batch 0 has no labels"):
        scorer(build("llama"), [inputs | {"labels": None}])


def test_a_batch_says_nothing_of_caches_and_a_generator_serves_both_tasks():
    model, inputs = build("llama"), batch("llama")
    expected = WandaSP()(model, [inputs])
    for calibration in (
        [inputs | {"use_cache": True, "labels": None}],
        dict.fromkeys(TASKS, iter([inputs])),
    ):
        scores = WandaSP()(model, calibration)
        assert all(torch.equal(scores[name], expected[name]) for name in expected)


def test_activations_that_are_not_finite_are_reported():
    model = build("llava")
    with torch.no_grad():
        tower_layers(model, "language")[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(
        UnsupportedModelError, match=r"WandaSP gave NaN or infinity for language\.1\.ffn"
    ):
        WandaSP()(model, [batch("llava")])
