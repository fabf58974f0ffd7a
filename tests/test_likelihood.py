"""The likelihood of reference answers: the model's own loss, whatever the rows, the padding, the
plan and the head; and what greedy decoding writes.
"""

import math

import pytest
import torch
import transformers
from devices import LiveBytes
from hypothesis import given, settings
from hypothesis import strategies as st
from models import IMAGE_TOKEN, PECULIAR, SIZES, VARIED, batch, build
from plans import random_scores

from hipp_ext import masked, prune, testbed
from hipp_ext.calibration import encode
from hipp_ext.errors import CalibrationError, UnsupportedModelError
from hipp_ext.groups import find_groups
from hipp_ext.likelihood import AnswerLikelihood
from hipp_ext.scorers import WandaSP
from hipp_ext.surgery.slices import sliced
from hipp_ext.units import plan_from_counts

RELATIVE = 1e-5


@torch.no_grad()
def losses(model, batches):
    """Minus the model's own loss on each batch of one row."""
    return torch.tensor([-float(model(**b).loss) for b in batches])


def answering(name, size=3, seed=0):
    """A batch whose answers have one to four tokens at the end of the row."""
    rows = batch(name, size=size, seed=seed, labels=True)
    for row, labels in enumerate(rows["labels"]):
        labels[: len(labels) - 1 - (row + seed) % 4] = -100
    return rows


@pytest.mark.parametrize("name", [*VARIED, *PECULIAR])
def test_a_row_is_worth_minus_the_models_loss(name):
    model = build(name)
    kind = {"granite_llava": "llava", "gemma3": "llava"}.get(name, name)
    batches = [answering(kind, size=1, seed=seed) for seed in range(3)]
    if name == "gemma3":
        batches = [b | {"token_type_ids": (b["input_ids"] == IMAGE_TOKEN).long()} for b in batches]
    found = AnswerLikelihood(model, batches)(model)
    assert found.dtype == torch.float32 and found.shape == (3,) and found.max() < 0
    assert torch.allclose(found, losses(model, batches), rtol=RELATIVE)


HEADS = {
    "Cohere": {"logit_scale": 0.2},
    "Granite": {"logits_scaling": 4.0},
    "Gemma2": {"final_logit_softcapping": 0.5},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_scaled_and_capped_logits_are_the_models(name, dtype):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **HEADS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().to(dtype)
    model.get_output_embeddings().weight.data.mul_(20)  # logits of a size that a cap changes
    rows = answering("llama", size=1)
    assert torch.allclose(
        AnswerLikelihood(model, [rows])(model),
        losses(model, [rows]),
        rtol=RELATIVE if dtype == torch.float32 else 0.05,
    )


MODEL = build("llava")
ROWS = answering("llava", size=5)
EXPECTED = AnswerLikelihood(MODEL, [ROWS])(MODEL)


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(5)), st.integers(0, 3), st.integers(0, 3), st.integers(1, 5))
def test_order_padding_and_batches_do_not_matter(order, left, right, size):
    def padded(rows, fill):
        shape = len(rows), left + rows.shape[1] + right
        result = torch.full(shape, fill)
        result[:, left : left + rows.shape[1]] = rows
        return result

    # Labels of the padding are those of a data collator that forgets about it.
    fills = {"input_ids": 0, "attention_mask": 0, "labels": 0}
    rows = {k: padded(v[order], fills[k]) if k in fills else v[order] for k, v in ROWS.items()}
    batches = [{k: v[i : i + size] for k, v in rows.items()} for i in range(0, 5, size)]
    assert torch.allclose(
        AnswerLikelihood(MODEL, batches)(MODEL), EXPECTED[order], rtol=10 * RELATIVE
    )


@pytest.mark.parametrize("name", ["llava", "llava_gqa", "qwen2_5_vl", "smolvlm", "llama"])
def test_masked_sliced_and_pruned_are_equally_likely(name):
    model = build(name)
    groups, scores = find_groups(model), random_scores(find_groups(model))
    counts = [max(1, g.width // 2) for g in groups]
    plan = plan_from_counts(groups, counts, scores)
    likelihood = AnswerLikelihood(model, [answering(name), answering(name, seed=1)])
    dense = likelihood(model)
    with masked(model, plan):
        hidden = likelihood(model)
    assert not torch.allclose(hidden, dense, rtol=1e-2)
    assert torch.allclose(likelihood(prune(model, plan)), hidden, rtol=10 * RELATIVE)
    with sliced(model, groups, scores) as shrink:
        shrink(counts)
        assert torch.allclose(likelihood(model), hidden, rtol=10 * RELATIVE)
    assert torch.equal(likelihood(model), dense)


def test_logits_of_a_large_vocabulary_are_made_in_chunks():
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": 20_011})
    model = transformers.LlamaForCausalLM(config).eval()
    rows = batch("llama", size=8, length=60, labels=True)
    one = 4 * config.vocab_size  # bytes of the logits of a token
    peaks, found = [], []
    for tokens in (1, 16, 1 << 20):
        likelihood = AnswerLikelihood(model, [rows], memory_limit=tokens * one)
        with LiveBytes() as live:
            found.append(likelihood(model))
        peaks.append(live.peak / one)
    assert peaks[0] < 8 and peaks[1] < 3 * 16 + 8 < 8 * 60 < peaks[2]
    assert all(torch.allclose(f, found[-1], rtol=RELATIVE) for f in found)


def test_rows_without_an_answer_are_refused():
    rows = answering("llava")
    with pytest.raises(CalibrationError, match="Batch 0 has no labels, only"):
        AnswerLikelihood(MODEL, [{k: v for k, v in rows.items() if k != "labels"}])
    with pytest.raises(CalibrationError, match="Row 1 of batch 1 has no answer"):
        silent = rows["labels"].clone()
        silent[1, 1:] = -100
        AnswerLikelihood(MODEL, [rows, rows | {"labels": silent}])


def test_a_tower_that_answers_differently_when_called_again_is_refused():
    class Tired(transformers.models.llama.modeling_llama.LlamaModel):
        def forward(self, *args, inputs_embeds=None, **kwargs):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(*args, inputs_embeds=inputs_embeds * self.calls**3, **kwargs)

    model = build("llava")
    model.model.language_model.__class__ = Tired
    with pytest.raises(UnsupportedModelError, match="likelihoods that differ .* by .* nats"):
        AnswerLikelihood(model, [answering("llava")])


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3])
def test_greedy_decoding_writes_an_answer_whose_tokens_are_likelier_than_not(ratio):
    model, processor = testbed.load()
    asked = testbed.questions("Captions", "validation", 48)
    prompts, images, answers = zip(*((q.prompt, q.image, q.answer) for q in asked), strict=True)
    rows = encode(processor, prompts, images, answers)
    groups = find_groups(model)
    counts = [round((1 - ratio) * g.width) for g in groups]
    scores = WandaSP()(model, testbed.calibration_batches(processor, n=8))
    with masked(model, plan_from_counts(groups, counts, scores)), torch.no_grad():
        logits = model(**{k: v for k, v in rows.items() if k != "labels"}).logits[:, :-1]
        found = AnswerLikelihood(model, [rows])(model)
        asking = encode(processor, prompts, images)
        written = model.generate(**asking, max_new_tokens=8, do_sample=False)
    p = logits.softmax(-1).gather(2, rows["input_ids"][:, 1:, None])[..., 0]
    certain = 0
    for row, label in enumerate(rows["labels"]):
        own = p[row][label[1:] != -100]
        assert float(found[row]) == pytest.approx(float(own.log().mean()), rel=1e-4, abs=1e-5)
        likelier = bool((own > 0.5).all())
        # The product of the probabilities is above one half only if each of them is.
        assert likelier or len(own) * float(found[row]) < math.log(0.5) + 1e-4
        if likelier:
            certain += 1
            ids = label[label != -100]
            start = asking["input_ids"].shape[1]
            assert torch.equal(written[row, start : start + len(ids)], ids)
    assert certain > 0
