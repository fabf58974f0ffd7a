"""Distillation against the formulas on whole logits, on tiny real models."""

import copy
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch as make_batch
from models import build
from plans import dropping_plan, random_plan
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from hipp_ext import prune
from hipp_ext.errors import (
    CalibrationError,
    CheckpointError,
    HippError,
    PlanError,
    UnsupportedModelError,
)
from hipp_ext.output_head import OutputHead
from hipp_ext.recover import CrossEntropy, Distillation, ModelTeacher
from hipp_ext.recover.divergence import Full, TopK
from hipp_ext.recover.vocabulary import Vocabulary
from hipp_ext.testbed.model import build_processor

LIMIT = 5 * 97 * 4  # logits of five positions


def pair(name: str = "llama") -> tuple[nn.Module, nn.Module]:
    """(dense model, another one, pruned), in eval mode."""
    student = build(name, seed=1)
    return build(name), prune(student, random_plan(student)).eval()


def data(name: str = "llama", rows: int = 3) -> dict[str, torch.Tensor]:
    """Rows whose answers are their last tokens, the first row padded on the left."""
    batch = make_batch(name, size=rows, length=9, labels=True)
    for row in range(rows):
        batch["labels"][row, : -3 - row] = -100
    if "pixel_values" not in batch:
        batch["attention_mask"][0, :2] = 0
    return batch


def naive(student, teacher, batch, temperature=1.0, cross_entropy_share=0.0):
    """The loss and its parts, from the logits of all positions."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    answers = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        p = (teacher(**inputs).logits[:, :-1] / temperature).log_softmax(-1)[answers]
    z = student(**inputs).logits[:, :-1][answers]
    q = (z / temperature).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    surprise = F.cross_entropy(z, batch["labels"][:, 1:][answers])
    loss = (1 - cross_entropy_share) * temperature**2 * kl + cross_entropy_share * surprise
    return loss, kl, surprise


def gradients(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n: g for (n, _), g in zip(named, found, strict=True) if g is not None}


def assert_equal_gradients(found, expected, tolerance=2e-5):
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl", "granite_llava", "gemma3"])
def test_value_and_gradients_are_those_of_the_whole_vocabulary(name):
    teacher, student = pair(name)
    objective = Distillation(
        ModelTeacher(teacher), temperature=2.0, cross_entropy_share=0.3, memory_limit=LIMIT
    )
    batch = data(name)
    found = objective.losses(student, batch)
    loss, kl, surprise = naive(student, teacher, batch, 2.0, 0.3)
    torch.testing.assert_close(found["loss"], loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["kl"], kl.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["cross_entropy"], surprise.detach(), rtol=1e-5, atol=1e-6)
    assert not found["kl"].requires_grad and float(kl) > 0.01
    assert_equal_gradients(gradients(found["loss"], student), gradients(loss, student))


@pytest.fixture(scope="module")
def llamas():
    teacher, student = pair()
    return ModelTeacher(teacher), student


@settings(max_examples=15, deadline=None)
@given(
    temperature=st.floats(0.3, 8),
    rows=st.integers(1, 4),
    chunk=st.integers(1, 20),
    share=st.floats(0, 1),
)
def test_any_temperature_shape_and_chunk(llamas, temperature, rows, chunk, share):
    teacher, student = llamas
    objective = Distillation(
        teacher, temperature=temperature, cross_entropy_share=share, memory_limit=chunk * 97 * 4
    )
    batch = data(rows=rows)
    found = objective.losses(student, batch)["loss"]
    loss, *_ = naive(student, teacher.model, batch, temperature, share)
    torch.testing.assert_close(found, loss, rtol=1e-4, atol=1e-5)
    assert_equal_gradients(gradients(found, student), gradients(loss, student), 1e-4)


def test_all_text_positions_and_those_of_packed_rows(llamas):
    teacher, student = llamas
    rows = [make_batch("llama", size=1, length=n, seed=n)["input_ids"] for n in (4, 6)]
    parts = [
        Distillation(teacher, positions="text").losses(student, {"input_ids": r}) for r in rows
    ]
    packed = {
        "input_ids": torch.cat(rows, 1),
        "position_ids": torch.cat([torch.arange(r.shape[1]) for r in rows])[None],
    }
    found = Distillation(teacher, positions="text").losses(student, packed)
    assert found.keys() == {"loss", "kl"}
    torch.testing.assert_close(found["loss"], (4 * parts[0]["loss"] + 6 * parts[1]["loss"]) / 10)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    teacher, student = build("llava"), build("llava")
    for top_k in (None, 5, 97):
        objective = Distillation(
            ModelTeacher(teacher), top_k=top_k, hidden_share=0.2, temperature=1.7
        )
        found = objective.losses(student, data("llava"))
        assert abs(float(found["loss"])) < 1e-6 and float(found["hidden"]) == 0
        assert all(float(g.abs().max()) < 1e-6 for g in gradients(found["loss"], student).values())


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made inside the block and are alive, at most at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def test_the_memory_of_logits_is_bounded():
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    teacher, student = (LlamaForCausalLM(LlamaConfig(vocab_size=9001, **sizes)) for _ in range(2))
    ids = torch.randint(9001, (4, 101))
    limit, whole = 1 << 19, 4 * 400 * 9001

    def peak(compute) -> int:
        with LiveBytes() as live:
            compute().backward()
        student.zero_grad()
        return live.peak

    objective = Distillation(ModelTeacher(teacher), positions="text", memory_limit=limit)
    batch = {"input_ids": ids, "labels": ids}
    objective.losses(student, batch)  # both heads are measured once
    head = 4 * 9001 * 8
    found = peak(lambda: objective.losses(student, batch)["loss"])
    assert found < 12 * limit + 5 * head < whole / 1.8
    assert peak(lambda: naive(student, teacher, batch)[0]) > 3 * whole


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpoints(llamas, reentrant):
    teacher, student = llamas
    student, batch = copy.deepcopy(student), data()
    loss, *_ = naive(student, teacher.model, batch)
    expected = gradients(loss, student)
    student.gradient_checkpointing_enable({"use_reentrant": reentrant})
    student.train()
    if reentrant:
        student.enable_input_require_grads()
        with pytest.raises(UnsupportedModelError, match="reentrant checkpoints cut them"):
            Distillation(teacher, hidden_share=0.5, hidden_layers=[0]).losses(student, batch)
    student.zero_grad()
    share = 0.0 if reentrant else 1e-9
    Distillation(teacher, hidden_share=share).losses(student, batch)["loss"].backward()
    found = {n: p.grad for n, p in student.named_parameters()}
    assert_equal_gradients(found, expected, 1e-4)


def test_adapters_and_a_head_among_them(llamas):
    from peft import LoraConfig, get_peft_model

    teacher, student = llamas
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj", "lm_head"])
    wrapped, batch = get_peft_model(copy.deepcopy(student), config), data()
    for n, p in wrapped.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p)
    found = Distillation(teacher, memory_limit=LIMIT).losses(wrapped, batch)["loss"]
    loss, *_ = naive(wrapped, teacher.model, batch)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
    expected = gradients(loss, wrapped)
    assert expected and all("lora" in name for name in expected)
    assert_equal_gradients(gradients(found, wrapped), expected)


def test_autocast(llamas):
    teacher, student = llamas
    batch = data()
    with torch.autocast("cpu", torch.bfloat16):
        found = Distillation(teacher, memory_limit=LIMIT).losses(student, batch)["loss"]
    exact = Distillation(teacher).losses(student, batch)["loss"]
    assert found.dtype == torch.float32 and found != exact
    torch.testing.assert_close(found, exact, rtol=0.03, atol=0)
    expected = gradients(exact, student)
    assert_equal_gradients(gradients(found, student), expected, 0.05)


@pytest.mark.parametrize("trained", ["norm", "language_model", "vision_tower"])
def test_parameters_of_two_types_under_autocast(trained):
    teacher, student = pair("llava")
    exact = Distillation(ModelTeacher(teacher)).losses(student, data("llava"))
    student.bfloat16()
    for name, p in student.named_parameters():
        p.requires_grad_(trained in name)
        p.data = p.data.float() if trained in name else p.data
    objective = Distillation(ModelTeacher(teacher))
    objective.prepare(student, data("llava"))
    with torch.autocast("cpu", torch.bfloat16):
        found = objective.losses(student, data("llava"))
    torch.testing.assert_close(found["loss"], exact["loss"], rtol=0.1, atol=0)
    assert any(g.any() for g in gradients(found["loss"], student).values())


def test_a_teacher_in_half_precision_reads_pictures():
    teacher, student = pair("llava")
    exact = Distillation(ModelTeacher(copy.deepcopy(teacher))).losses(student, data("llava"))
    half = ModelTeacher(teacher, dtype=torch.bfloat16, device="cpu")
    found = Distillation(half).losses(student, data("llava"))
    assert next(half.model.parameters()).dtype == torch.bfloat16 and found["kl"] != exact["kl"]
    torch.testing.assert_close(found["kl"], exact["kl"], rtol=0.05, atol=0)


# ---------------------------------------------------------------------------------------- top k


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), scale=st.floats(0.01, 20), size=st.integers(2, 60))
def test_the_top_k_divergence_is_a_lower_bound_that_grows_to_the_full_one(seed, scale, size):
    generator = torch.Generator().manual_seed(seed)
    p, z = (scale * torch.randn(3, size, generator=generator) for _ in range(2))
    log_p = p.log_softmax(-1)
    full = Full(log_p=log_p).kl(z)
    before = torch.zeros(3)
    for k in sorted({1, 2, size // 2 or 1, size - 1, size}):
        top = TopK.of(log_p, k)
        found = top.kl(z)
        assert (found >= before - 1e-4 * scale).all() and (found <= full + 1e-4 * scale).all()
        torch.testing.assert_close(TopK.of(log_p, size).first(k).kl(z), found, rtol=1e-3, atol=1e-3)
        before = found
    torch.testing.assert_close(before, full, rtol=1e-3, atol=1e-4)


def test_the_top_k_divergence_is_that_of_merged_tokens():
    p, z = torch.randn(2, 4, 9)
    log_p, log_q = p.log_softmax(-1), z.log_softmax(-1)
    order = log_p.argsort(descending=True)
    p, q = (x.gather(-1, order).exp() for x in (log_p, log_q))
    merged = [torch.cat([x[:, :3], x[:, 3:].sum(-1, keepdim=True)], -1) for x in (p, q)]
    expected = (merged[0] * (merged[0] / merged[1]).log()).sum(-1)
    torch.testing.assert_close(TopK.of(log_p, 3).kl(z), expected)


def test_tokens_that_are_never_put_out_cost_nothing():
    blocked = OutputHead(blocked=(1, 4))
    z = torch.randn(2, 6, requires_grad=True)
    log_p = blocked.of(torch.randn(2, 6)).log_softmax(-1)
    for distribution in (Full(log_p=log_p), TopK.of(log_p, 5), TopK.of(log_p, 6)):
        kl = distribution.kl(blocked.of(z) / 0.5)
        (gradient,) = torch.autograd.grad(kl.sum(), z)
        assert kl.isfinite().all() and gradient.isfinite().all() and (gradient[:, 1] == 0).all()


# --------------------------------------------------------------------------------- hidden states


def test_hidden_states_of_a_model_with_dropped_layers():
    teacher, dense = build("llama"), build("llama", seed=1)
    student = prune(dense, dropping_plan(dense, "language.1.attention", "language.1.ffn")).eval()
    assert len(student.model.layers) == 2
    objective = Distillation(ModelTeacher(teacher), hidden_share=0.25, hidden_layers=[0, 1, 2])
    batch = data()
    found = objective.losses(student, batch)
    answers = batch["labels"][:, 1:] != -100
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    states = {}
    for name, model in (("teacher", teacher), ("student", student)):
        seen = []
        hooks = [
            layer.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
            for layer in model.model.layers
        ]
        model(**inputs)
        for hook in hooks:
            hook.remove()
        states[name] = [x[:, :-1][answers] for x in seen]
    goals, own = states["teacher"], [states["student"][i] for i in (0, 0, 1)]
    parts = [(s - t).square().mean() / t.square().mean() for s, t in zip(own, goals, strict=True)]
    loss, *_ = naive(student, teacher, batch)
    expected = 0.75 * loss + 0.25 * sum(parts) / 3
    torch.testing.assert_close(found["hidden"], (sum(parts) / 3).detach())
    torch.testing.assert_close(found["loss"], expected)
    assert_equal_gradients(gradients(found["loss"], student), gradients(expected, student))


def test_hidden_states_that_cannot_be_compared():
    teacher, student = ModelTeacher(build("llama")), build("llama", seed=1)
    with pytest.raises(PlanError, match="hidden_layers: 3; the dense model has layers 0 to 2"):
        Distillation(teacher, hidden_share=0.1, hidden_layers=[3]).losses(student, data())
    names = [f"language.0.{kind}" for kind in ("attention", "ffn")]
    student = prune(student, dropping_plan(student, *names))
    with pytest.raises(PlanError, match="hidden_layers: 0; the student has no layer up to"):
        Distillation(teacher, hidden_share=0.1).losses(student, data())
    del student.hipp_plan
    with pytest.raises(PlanError, match="2 of the teacher's 3 layers and no plan"):
        Distillation(teacher, hidden_share=0.1).losses(student, data())


# ------------------------------------------------------------------------------------- refusals


def test_vocabularies_that_differ_are_refused():
    def vocabulary(change=lambda tokenizer: None) -> Vocabulary:
        processor = build_processor()
        change(processor.tokenizer)
        return Vocabulary.of(model, processor)

    model = build("llama")
    same = vocabulary()
    same.check_same(vocabulary())
    same.check_same(Vocabulary.of(model))  # no tokenizer is known

    def end(tokenizer):
        tokenizer.eos_token = "zebra"

    for change, message in (
        (
            lambda t: t.add_tokens(["zebra"]),
            r"1 token \('zebra' is missing for the teacher, \d+ for",
        ),
        (end, r"special id.*'eos_token_id' is \d+ for the teacher"),
    ):
        with pytest.raises(CheckpointError, match=f"different vocabularies: .*{message}"):
            same.check_same(vocabulary(change))
    model.resize_token_embeddings(104)
    with pytest.raises(CheckpointError, match="the teacher has 97 logits, the student 104"):
        Distillation(ModelTeacher(build("llama"))).losses(model, data())
    with pytest.raises(CheckpointError, match="image token is None for the teacher, 5 for the stu"):
        Distillation(ModelTeacher(build("llama"))).losses(build("llava"), data("llava"))


def test_a_head_that_cannot_be_reproduced_is_refused(llamas):
    class Shifted(nn.Linear):
        shift = 0.0

        def forward(self, x):
            Shifted.shift += 1  # another function at every call
            return super().forward(x) + Shifted.shift * torch.arange(97) / 97

    teacher, student = llamas
    student = copy.deepcopy(student)
    student.lm_head.__class__ = Shifted
    with pytest.raises(UnsupportedModelError, match="computes its logits in an unknown way"):
        Distillation(teacher).losses(student, data())


def test_batches_without_anything_to_learn(llamas):
    teacher, student = llamas
    batch = data()
    batch["labels"].fill_(-100)
    with pytest.raises(CalibrationError, match="3 rows has no label that counts.*'answers'"):
        Distillation(teacher).losses(student, batch)
    with pytest.raises(CalibrationError, match="no position of the batch has a label"):
        Distillation(teacher, positions="text", cross_entropy_share=0.1).losses(student, batch)
    with pytest.raises(CalibrationError, match="1 rows has no text"):
        Distillation(teacher, positions="text").losses(
            student, {"input_ids": torch.ones(1, 1).long()}
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature=0: a finite number above 0"),
        ({"positions": "all"}, "positions='all': one of answers, text"),
        ({"top_k": 0}, "top_k=0: a whole number of at least 1"),
        ({"cross_entropy_share": -0.1}, "cross_entropy_share=-0.1: a finite number of at least 0"),
        ({"cross_entropy_share": 0.7, "hidden_share": 0.7}, "the shares add up to 1.4; 1 is the"),
        ({"memory_limit": 0}, "memory_limit=0"),
    ],
)
def test_bad_options(llamas, options, message):
    with pytest.raises(HippError, match=message):
        Distillation(llamas[0], **options)


def test_the_models_own_loss(llamas):
    _, student = llamas
    found = CrossEntropy().losses(student, data())
    torch.testing.assert_close(found["loss"], student(**data()).loss)
    with pytest.raises(UnsupportedModelError, match="Linear has no output embeddings"):
        Vocabulary.of(nn.Linear(2, 2))
