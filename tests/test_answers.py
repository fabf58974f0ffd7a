"""Answers with shared prefixes equal those without, for any model, padding and plan."""

import pytest
import torch
import transformers
import zoo
from devices import LiveBytes
from models import IMAGE_TOKEN, SIZES, VARIED, batch, build
from plans import dropping_plan, random_scores

from hipp_ext import masked, prune, testbed
from hipp_ext.answers import AnswerLogits
from hipp_ext.calibration import encode
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups import find_groups
from hipp_ext.output_head import fit_output_head
from hipp_ext.surgery.slices import sliced

CLIP = dict(
    hidden_size=36,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=32,
    patch_size=8,
)


def together(first, second):
    return {k: torch.cat([first[k], second[k]]) for k in first}


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize("padded", ["left", "right", "not"])
def test_shared_equals_replayed(name, padded):
    model = build(name)
    groups, scores = find_groups(model), random_scores(find_groups(model))
    # Two rows with the same pictures and the same start, two with others.
    rows = together(batch(name), batch(name))
    rows["input_ids"][2:, -1] = rows["input_ids"][2:, -1].flip(0)
    if padded != "not":
        rows["attention_mask"][1, 0 if padded == "left" else -1] = 0
    shared, replayed = (
        AnswerLogits(model, [rows, batch(name, seed=1)]),
        AnswerLogits(model, [rows, batch(name, seed=1)], share=False),
    )
    assert torch.allclose(shared(model), replayed(model), atol=1e-5)
    with sliced(model, groups, scores) as shrink:
        shrink([max(1, g.width // 2) for g in groups])
        assert torch.allclose(shared(model), replayed(model), atol=1e-5)


def test_one_prefix_for_all_questions_about_a_picture():
    model, processor = testbed.load()
    questions = testbed.questions("POPE", "search", 12)
    batches = [encode(processor, [q.prompt for q in questions], [q.image for q in questions])]
    answers = AnswerLogits(model, batches)
    pictures = len({q.picture for q in questions})
    assert sum(len(group.prefix) for group in answers._batches) == pictures < 6
    run = []
    tower = model.model.language_model
    handle = tower.register_forward_pre_hook(
        lambda _, __, kwargs: run.append(kwargs["inputs_embeds"].shape), with_kwargs=True
    )
    got = answers(model)
    handle.remove()
    tokens = sum(rows * length for rows, length, _ in run)
    assert tokens < 0.6 * batches[0]["input_ids"].numel()
    with torch.no_grad():
        assert torch.allclose(got, model(**batches[0]).logits[:, -1], atol=1e-4)


def test_rows_with_labels_stop_where_the_answer_starts():
    model = build("llava")
    rows = batch("llava", labels=True, size=3)
    first = torch.tensor([18, 20, 19])
    for label, last in zip(rows["labels"], first.tolist(), strict=True):
        label[: last + 1] = -100
    with torch.no_grad():
        expected = model(**{k: v for k, v in rows.items() if k != "labels"}).logits[
            torch.arange(3), first
        ]
    assert torch.allclose(AnswerLogits(model, [rows])(model), expected, atol=1e-5)


def test_a_window_shorter_than_the_rows_is_replayed():
    model = build("llava")
    model.model.language_model.config.sliding_window = 4
    assert not AnswerLogits(model, [batch("llava")])._batches
    model.model.language_model.config.sliding_window = 4000
    assert AnswerLogits(model, [batch("llava")])._batches


def test_rows_on_both_sides_of_the_window_come_back_in_their_order():
    model = build("llava")
    model.model.language_model.config.sliding_window = 22  # which a Llama does not care for
    batches = [batch("llava", length=n, seed=n) for n in (5, 8, 4, 7)]
    answers = AnswerLogits(model, batches)
    assert len(answers._replayed) == 2 and answers._batches
    with torch.no_grad():
        expected = torch.cat([model(**b).logits[:, -1] for b in batches])
    assert torch.allclose(answers(model), expected, atol=1e-5)


def pope_batches(processor, n, rows=16):
    questions = testbed.questions("POPE", "search", n)
    some = [questions[i : i + rows] for i in range(0, n, rows)]
    return [encode(processor, [q.prompt for q in qs], [q.image for q in qs]) for qs in some]


def test_memory_stays_within_one_extra_copy_of_what_is_kept():
    model, processor = testbed.load()
    batches = pope_batches(processor, 192)
    with torch.no_grad(), LiveBytes() as once:
        model.get_image_features(
            pixel_values=batches[0]["pixel_values"]
        )  # what a batch needs before the language tower
    with LiveBytes() as making:
        answers = AnswerLogits(model, batches)
    assert making.peak < 2 * making.now + once.peak
    rows = (
        sum(int(b["attention_mask"].sum()) for b in batches)
        * model.get_input_embeddings().weight[0].nbytes
    )
    assert making.now < 0.5 * rows, (
        "some ten questions about a picture, and its embeddings are kept for each"
    )
    with LiveBytes() as calling:
        answers(model)
    layers = len(model.model.language_model.layers)
    per_row = max(
        2 * layers * group.prefix[0].nbytes * len(group.prefix_index) for group in answers._batches
    )
    assert calling.peak < per_row, "keys and values of all layers were held once per row"
    assert calling.now < 0.1 * calling.peak


def test_fewer_rows_run_together_where_keys_and_values_would_take_more_memory():
    model, processor = testbed.load()
    batches = pope_batches(processor, 48, rows=48)
    picture = max(len(b.prefix[0]) for b in AnswerLogits(model, batches)._batches)
    per_token = (
        2 * 4 * model.config.text_config.hidden_size * len(model.model.language_model.layers)
    )
    peaks, answers = [], []
    for pictures in (0.5, 1, 3, 1000):
        asked = AnswerLogits(model, batches, memory_limit=int(pictures * picture * per_token))
        prefixes = [len(group.prefix) for group in asked._batches]
        there = len({q.picture for q in testbed.questions("POPE", "search", 48)})
        assert max(prefixes) == min(max(1, int(pictures)), there)
        assert sum(prefixes) == there, (
            "a picture that several questions share was computed more than once"
        )
        with LiveBytes() as live:
            answers.append(asked(model))
        peaks.append(live.peak)
    assert all(torch.allclose(a, answers[-1], atol=1e-4) for a in answers)
    assert peaks[0] <= peaks[1] < 0.7 * peaks[2] < 0.7 * peaks[3]


def scaled_model(name, extra):
    config = getattr(transformers, f"{name}Config")(**SIZES, **extra)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def wrapped_model(name, **extra):
    """A wrapper with a head of its own around a text model that scales or caps its logits."""
    vision = {
        **CLIP,
        "model_type": "siglip_vision_model"
        if name in ("AyaVision", "PaliGemma")
        else "clip_vision_model",
    }
    config = getattr(transformers, f"{name}Config")(
        text_config=SIZES | extra, vision_config=vision, image_token_id=IMAGE_TOKEN
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


MAMBA = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
HEADS = {
    "Cohere": lambda: scaled_model("Cohere", {"logit_scale": 0.2}),
    "Granite": lambda: scaled_model("Granite", {"logits_scaling": 4.0}),
    "HyperCLOVA X": lambda: scaled_model(
        "HyperCLOVAX", {"logits_scaling": 4.0}
    ),  # the same word, and it multiplies
    "Gemma 2": lambda: scaled_model("Gemma2", {"final_logit_softcapping": 0.5}),
    "Falcon-H1": lambda: scaled_model("FalconH1", {"lm_head_multiplier": 0.25} | MAMBA),
    "LLaVA-NeXT of Granite": lambda: wrapped_model(
        "LlavaNext", model_type="granite", logits_scaling=8.0
    ),
    "Aya Vision": lambda: wrapped_model("AyaVision", model_type="cohere2", logit_scale=0.0625),
    "PaliGemma 2": lambda: wrapped_model(
        "PaliGemma", model_type="gemma2", final_logit_softcapping=0.5
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_logits_are_the_models_whatever_it_does_after_the_head(name, dtype):
    torch.manual_seed(0)
    model, rows = HEADS[name]().to(dtype), batch("llama")
    model.get_output_embeddings().weight.data.mul_(20)  # logits of a size that a cap changes
    with torch.no_grad():
        expected = model(**rows).logits[:, -1].float()
    precision = 1e-5 if dtype == torch.float32 else 0.05
    assert torch.allclose(
        AnswerLogits(model, [rows])(model), expected, atol=precision * float(expected.abs().max())
    )


def test_logits_that_no_known_head_gives_are_refused():
    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.arange(output.logits.shape[-1]) / 10
            return output

    torch.manual_seed(0)
    model = Shifted(transformers.LlamaConfig(**SIZES)).eval()
    with pytest.raises(UnsupportedModelError, match="computes its logits in an unknown way"):
        AnswerLogits(model, [batch("llama")])


def test_a_model_whose_rows_cannot_share_a_prefix_is_replayed():
    class Counting(transformers.models.llama.modeling_llama.LlamaModel):
        """A decoder that treats the first token it is given differently, as convolutions and
        recurrent layers do.
        """

        def forward(self, *args, inputs_embeds=None, **kwargs):
            changed = inputs_embeds.clone()
            changed[:, 0] += 1
            return super().forward(*args, inputs_embeds=changed, **kwargs)

    model = build("llava")
    model.model.language_model.__class__ = Counting
    answers = AnswerLogits(model, [batch("llava")])
    assert not answers._batches
    with torch.no_grad():
        assert torch.allclose(answers(model), model(**batch("llava")).logits[:, -1], atol=1e-5)


def test_a_mask_for_each_kind_of_layer_is_replayed():
    model, rows = build("gemma3"), batch("llava")
    rows["token_type_ids"] = (rows["input_ids"] == IMAGE_TOKEN).long()
    with torch.no_grad():
        assert torch.allclose(
            AnswerLogits(model, [rows])(model), model(**rows).logits[:, -1], atol=1e-5
        )


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llama"])
def test_a_model_without_some_blocks_answers_the_same(name):
    model = build(name)
    small = prune(model, dropping_plan(model, "language.0.attention", "language.2.ffn"))
    batches = [batch(name, size=3, labels=True), batch(name, size=2, seed=1, labels=True)]
    answers = AnswerLogits(small, batches)(small)
    with masked(model, small.hipp_plan):
        expected = AnswerLogits(model, batches)(model)
    assert torch.allclose(answers, expected, atol=1e-4 * float(expected.abs().max()))


def test_tokens_that_are_never_answered_are_no_part_of_the_head():
    model, inputs = zoo.build("chameleon"), zoo.batch("chameleon")
    head, logits = fit_output_head(model, inputs, torch.tensor([10, 10]))
    assert head.scale == 1 and head.blocked == tuple(range(20, 31))
    assert torch.equal(logits[:, 20:31], torch.full((2, 11), torch.finfo(torch.float32).min))

    def square(_, __, output):
        output.logits = torch.where(output.logits > -1e30, output.logits.square(), output.logits)

    model.register_forward_hook(square)
    with pytest.raises(UnsupportedModelError, match=r"unknown way.*go up to [0-9.]+\)"):
        AnswerLogits(model, [inputs])
