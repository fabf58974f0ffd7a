"""Families that do something of their own: planned and pruned rightly, or refused before anything
is changed.
"""

import pytest
import torch
import transformers
from models import SIZES, batch, build
from torch import nn

from hipp_ext import HiPPPlanner, Preference, masked, prune
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups import find_groups
from hipp_ext.scorers import Magnitude
from hipp_ext.units import plan_from_counts
from hipp_ext.verification import without_verification

MAMBA = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
NORMS = {  # before the blocks or after them, shared by two, without weights, under other names
    "Apertus": {},
    "Cohere": {},
    "Cohere2": {},
    "Exaone4": {},
    "FalconH1": MAMBA,
    "NanoChat": {},
    "Olmo": {},
    "StableLm": {"use_parallel_residual": True},
}


def text_model(name: str, **extra) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **SIZES | extra, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn(parameter.shape)
    return model


def halved(model: nn.Module):
    groups = find_groups(model)
    with without_verification():
        scores = Magnitude()(model)
    return plan_from_counts(groups, [max(1, g.width // 2) for g in groups], scores)


@torch.no_grad()
def logits(model: nn.Module, inputs: dict) -> torch.Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("name", [*NORMS, "mllama"])
def test_whatever_their_norms_they_are_planned_and_pruned_as_masked(name):
    model, inputs = (
        (build(name), batch(name))
        if name in ("mllama",)
        else (text_model(name, **NORMS[name]), batch("llama"))
    )
    planner = HiPPPlanner(Preference(1, 1, 1), pruning_ratio=0.3, partial="report")
    plan = planner.plan(model, calibration=[inputs])
    assert bool(plan.left_whole) == (name == "FalconH1")
    with masked(model, plan):
        expected = logits(model, inputs)
    assert not torch.allclose(expected, logits(model, inputs), atol=1e-3)
    assert torch.allclose(logits(prune(model, plan), inputs), expected, atol=1e-5)


def test_a_norm_of_its_own_for_every_head_cannot_stay_when_heads_go():
    with pytest.raises(
        UnsupportedModelError,
        match=r"q_layernorm.norms.0.weight has shape \(8,\): only the parameters",
    ):
        find_groups(text_model("StableLm", qk_layernorm=True))


def test_heads_that_are_subtracted_from_one_another_are_refused():
    with pytest.raises(UnsupportedModelError, match="lambda_q1 has shape"):
        find_groups(text_model("DiffLlama", num_hidden_layers=2))


def test_a_sink_for_every_head_is_no_norm_however_long():
    """As many heads as a head has numbers: each KV group takes its two sinks along."""
    model = text_model("GraniteSWA", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    attention, _ = find_groups(model)[:2]
    assert [(s.dim, s.size) for s in attention.owns if s.parameter.endswith(".sinks")] == [(0, 2)]


def test_a_norm_over_the_channels_of_a_block_is_refused():
    class Normed(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (
                block.gate_proj,
                block.up_proj,
                block.down_proj,
            )
            self.norm = nn.LayerNorm(block.gate_proj.out_features)

        def forward(self, x):
            return self.down_proj(self.norm(self.gate_proj(x).sigmoid() * self.up_proj(x)))

    model = build("llama")
    model.model.layers[1].mlp = Normed(model.model.layers[1].mlp)
    with pytest.raises(
        UnsupportedModelError,
        match=r"1\.mlp\.norm\.weight has shape \(44,\): a parameter with entries",
    ):
        find_groups(model)


class Misled(transformers.models.llama.modeling_llama.LlamaAttention):
    """Layers of the usual names and shapes whose heads are not what they seem."""

    def forward(
        self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs
    ):
        output, weights = super().forward(
            hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )
        numbers = (
            torch.arange(self.v_proj.weight.shape[0]) % 5 + 1.0
        )  # by place: not the same heads afterwards
        values = self.v_proj(hidden_states) * numbers
        return output + self.o_proj(values.repeat(1, 1, self.num_key_value_groups)), weights


class Sized(Misled):
    def forward(self, hidden_states, *args, **kwargs):
        (
            hidden_states.new_zeros(
                len(hidden_states), self.config.num_key_value_heads * self.head_dim
            )
            + self.k_proj(hidden_states)[:, 0]
        )
        return transformers.models.llama.modeling_llama.LlamaAttention.forward(
            self, hidden_states, *args, **kwargs
        )


@pytest.mark.parametrize(
    ("kind", "said"), [(Misled, "its logits differ by"), (Sized, "it does not run: RuntimeError")]
)
def test_a_model_that_only_looks_like_one_that_can_be_pruned_is_refused(kind, said):
    model = text_model("Llama")
    plan = halved(model)
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for action in (lambda: prune(model, plan), lambda: masked(model, plan).__enter__()):
        with pytest.raises(UnsupportedModelError, match=f"can be pruned, and are not: .* {said}"):
            action()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (
        model.model.layers[0].self_attn.q_proj.out_features == 32
        and model.model.layers[0].mlp.down_proj.in_features == 40
    )


def test_groups_are_verified_once(monkeypatch):
    model = text_model("Llama")
    plan, passes = halved(model), []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    prune(model, plan)
    assert len(passes) == 3
    prune(model, plan)
    assert len(passes) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_reason_to_refuse(dtype):
    model = text_model("Qwen2", num_hidden_layers=6).to(dtype)
    assert prune(model, halved(model)).dtype == dtype


def test_adapters_are_named():
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(
        UnsupportedModelError, match=r"^The model carries adapters \(.*q_proj.*merge_and_unload"
    ):
        find_groups(peft.get_peft_model(text_model("Llama"), config))
    adapted = peft.get_peft_model(
        text_model("Llama"), peft.LoraConfig(r=4, target_modules=["up_proj"], task_type="CAUSAL_LM")
    )
    with pytest.raises(UnsupportedModelError, match=r"^The model carries adapters .*up_proj"):
        Magnitude()(adapted)
