"""Answers with shared beginnings are those without, whatever the model, the padding, and the plan."""

import pytest
import torch
from models import BUILDERS, batch, build
from test_slices import scores_of

from hipp_ext import testbed
from hipp_ext.answers import AnswerLogits
from hipp_ext.calibration import encode
from hipp_ext.groups import find_groups
from hipp_ext.slices import sliced


def together(first, second):
    return {k: torch.cat([first[k], second[k]]) for k in first}


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("padded", ["left", "right", "not"])
def test_shared_equals_replayed(name, padded):
    model = build(name)
    groups, scores = find_groups(model), scores_of(model)
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


def test_one_beginning_for_all_questions_about_a_picture():
    model, processor = testbed.load()
    questions = testbed.questions("POPE", "search", 12)
    batches = [encode(processor, [q.prompt for q in questions], [q.image for q in questions])]
    answers = AnswerLogits(model, batches)
    pictures = len({q.picture for q in questions})
    assert sum(len(chunk.begin) for chunk in answers._chunks) == pictures < 6
    run = []
    tower = model.model.language_model
    handle = tower.register_forward_pre_hook(lambda _, __, kwargs: run.append(kwargs["inputs_embeds"].shape), with_kwargs=True)
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
        expected = model(**{k: v for k, v in rows.items() if k != "labels"}).logits[torch.arange(3), first]
    assert torch.allclose(AnswerLogits(model, [rows])(model), expected, atol=1e-5)


def test_a_window_shorter_than_the_rows_is_replayed():
    model = build("llava")
    model.model.language_model.config.sliding_window = 4
    assert not AnswerLogits(model, [batch("llava")])._chunks
    model.model.language_model.config.sliding_window = 4000
    assert AnswerLogits(model, [batch("llava")])._chunks
