"""The testbed: splits, questions, files, training, and the accuracy of the packaged model."""

import base64
import csv
import io
from collections import Counter

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from hipp_ext import save_pruned, testbed
from hipp_ext.calibration import encode
from hipp_ext.errors import CalibrationError, CheckpointError, DataError, OutputExistsError
from hipp_ext.evals.evaluator import Evaluator
from hipp_ext.testbed import world
from hipp_ext.testbed.conversations import collate
from hipp_ext.testbed.model import vocabulary
from hipp_ext.testbed.quiz import ask_presence

KINDS = ("random", "popular", "adversarial")


@pytest.fixture(scope="module")
def loaded():
    return testbed.load()


def test_splits_share_no_picture_and_no_wording():
    pictures, choices = Counter(), Counter()
    for split in testbed.SPLITS:
        pope, choice = testbed.questions("POPE", split), testbed.questions("ScienceQA", split)
        pictures.update({q.image.tobytes() for q in (*pope, *choice) if q.scene})
        pictures.update({q.scene.cells for q in (*pope, *choice) if q.scene})
        choices.update({q.prompt for q in choice if not q.scene})
    assert max(pictures.values()) == 1
    assert max(choices.values()) == 1


def test_a_scene_belongs_to_the_split_whose_stream_drew_it():
    for split in ("train", *testbed.SPLITS):
        assert {
            world.owner(scene.cells)
            for scene, _ in zip(world.stream(split), range(53), strict=False)
        } == {split}


def test_objects_can_be_told_apart():
    drawings = {world.sprite(name).tobytes() for name in world.OBJECTS}
    assert len(drawings) == len(world.OBJECTS) == 24
    assert not any(name[0] in "aeiou" for name in world.OBJECTS)  # "Is there a ..." fits all


@pytest.mark.parametrize("split", testbed.SPLITS)
def test_pope_asks_three_present_and_three_absent_objects_per_picture_and_kind(split):
    asked = {}
    for question in testbed.questions("POPE", split):
        name = question.question.split()[3]
        assert (question.answer == "Yes") == (name in question.scene.present)
        for kind in question.category.split(","):
            asked.setdefault((question.scene, kind), []).append((name, question.answer))
    assert {kind for _, kind in asked} == set(KINDS)
    for (scene, kind), rows in asked.items():
        absent = {name for name, answer in rows if answer == "No"}
        assert Counter(answer for _, answer in rows) == {"Yes": 3, "No": 3}
        if kind == "popular":
            assert absent == set(world.popular(scene)[:3])
        if kind == "adversarial":
            assert absent == set(world.adversarial(scene)[:3])


def test_adversarial_objects_are_those_that_most_accompany_the_present_ones():
    scene = next(world.stream("test"))
    ranking = world.adversarial(scene)
    pair = world.statistics()[1]
    support = [sum(pair[name, other] for other in scene.present) for name in ranking]
    assert support == sorted(support, reverse=True)
    assert set(ranking) == set(scene.absent)
    assert support[0] > 10 * (support[-1] + 1)  # scene types make the difference large


def test_more_questions_begin_with_the_same_ones():
    for task in testbed.TASKS:
        few, many = testbed.questions(task, "search", 7), testbed.questions(task, "search", 701)
        assert few == many[:7] and len(many) == 701
        assert [q.index for q in many] == list(range(701))


def test_multiple_choice_answers_name_the_fact():
    truth = {}
    for question in testbed.questions("ScienceQA", "test"):
        subject = question.scene.present if question.scene else None
        value = question.options["ABCD".index(question.answer)]
        assert truth.setdefault((question.question, subject), value) == value
        assert len(set(question.options)) == len(question.options) == 4


def test_the_prompt_is_vlmevalkits():
    question = next(q for q in testbed.questions("ScienceQA", "test") if q.hint)
    options = "".join(
        f"{letter}. {text}\n" for letter, text in zip("ABCD", question.options, strict=True)
    )
    ending = "Please select the correct answer from the options above. \n"
    assert (
        question.prompt
        == f"Hint: {question.hint}\nQuestion: {question.question}\nOptions:\n{options}{ending}"
    )


@pytest.mark.parametrize("task, name", [("POPE", "POPE.tsv"), ("ScienceQA", "ScienceQA_TEST.tsv")])
def test_the_files_hold_the_same_rows_as_the_questions(task, name, tmp_path):
    paths = testbed.export(tmp_path / "out", splits=("search",), n=101)
    assert tmp_path / "out" / "search" / name in paths
    csv.field_size_limit(1 << 24)
    with (tmp_path / "out" / "search" / name).open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    cells = {row["index"]: row["image"] for row in rows}
    assert len(cells) == len(rows) == 101
    for row, question in zip(rows, testbed.questions(task, "search", 101), strict=True):
        cell = row["image"] if len(row["image"]) > 64 else cells[row["image"]]
        picture = Image.open(io.BytesIO(base64.b64decode(cell)))
        assert picture.mode == "RGB" and picture.tobytes() == question.image.tobytes()
        assert (row["question"], row["answer"], row["category"]) == (
            question.question,
            question.answer,
            question.category,
        )
        assert tuple(row[x] for x in "ABCD" if row.get(x)) == question.options
        assert (row.get("hint") or None) == question.hint


def test_export_does_not_overwrite(tmp_path):
    testbed.export(tmp_path / "out", splits=("search",), n=2)
    with pytest.raises(OutputExistsError, match="exists"):
        testbed.export(tmp_path / "out", splits=("search",), n=2)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(DataError, match="'VQA'"):
        testbed.questions("VQA", "test")
    with pytest.raises(DataError, match="'train'"):
        testbed.questions("POPE", "train")
    with pytest.raises(CheckpointError, match="no model.safetensors"):
        testbed.load(folder=tmp_path)


def test_every_word_is_known_and_the_prompt_ends_where_the_answer_begins(loaded):
    model, processor = loaded
    for task in testbed.TASKS:
        rows = testbed.questions(task, "validation", 97)
        batch = encode(processor, [q.prompt for q in rows], [q.image for q in rows])
        assert processor.tokenizer.unk_token_id not in batch["input_ids"]
        assert processor.tokenizer.decode(batch["input_ids"][0, -2:]) == "ASSISTANT :"
        assert (batch["input_ids"] == model.config.image_token_id).sum(1).eq(25).all()
    assert len(processor.tokenizer) == len(vocabulary())


def test_calibration_batches_label_only_the_answer(loaded):
    _, processor = loaded
    batches = testbed.calibration_batches(processor, n=37, batch_size=16)
    assert [len(batch["input_ids"]) for batch in batches] == [16, 16, 5]
    words = Counter()
    for batch in batches:
        assert batch["pixel_values"].shape[1:] == (3, 40, 40)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            assert (labels != -100).sum() == 1 and ids[-1] == labels[-1]
            words[processor.tokenizer.decode(ids[-1:])] += 1
    assert words["Yes"] == 10 and words["No"] == 9 and set(words) == {"Yes", "No", *"ABCD"}
    assert "labels" not in testbed.calibration_batches(processor, n=2, with_labels=False)[0]
    with pytest.raises(CalibrationError, match="n=0"):
        testbed.calibration_batches(processor, n=0)


def test_calibration_by_task_holds_the_same_questions(loaded):
    _, processor = loaded

    def rows(batches):
        return sorted(
            tuple(ids[mask.bool()].tolist())
            for b in batches
            for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
        )

    tasks = testbed.calibration_tasks(processor, n=37, batch_size=16)
    assert rows(tasks["utility"] + tasks["robustness"]) == rows(
        testbed.calibration_batches(processor, n=37)
    )
    answers = {
        task: {processor.tokenizer.decode(i) for b in bs for i in b["input_ids"][:, -1:]}
        for task, bs in tasks.items()
    }
    assert answers == {"utility": set("ABCD"), "robustness": {"Yes", "No"}}
    with pytest.raises(CalibrationError, match="n=1"):
        testbed.calibration_tasks(processor, n=1)


def test_the_packaged_model_knows_its_world(loaded):
    pope, choice = (
        testbed.questions("POPE", "test", 700),
        testbed.questions("ScienceQA", "test", 300),
    )
    scores = Evaluator(*loaded, pope, choice).scores(loaded[0])
    assert scores["pope"].accuracy >= 95 and scores["choice"].accuracy >= 95


def test_training_rows_are_worded_as_the_processor_words_them(loaded):
    _, processor = loaded
    scene = next(world.stream("train"))
    questions = [ask_presence(scene, name, "Yes", "") for name in scene.present[:2]]
    batch = collate(processor, [([(q.prompt, "Yes") for q in questions], scene, True)])
    single = encode(processor, [questions[0].prompt], [world.render(scene)], ["Yes"])
    first = single["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :first], single["input_ids"])
    assert torch.equal(batch["labels"][:, :first], single["labels"])
    assert torch.allclose(batch["pixel_values"], single["pixel_values"], atol=1e-5)
    messages = []
    for q in questions:
        messages += [
            {
                "role": "user",
                "content": [{"type": "image"}] * (not messages)
                + [{"type": "text", "text": q.prompt}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
        ]
    text = processor.apply_chat_template(messages)
    assert torch.equal(
        processor(text=text, images=world.render(scene), return_tensors="pt")["input_ids"],
        batch["input_ids"],
    )


def test_generate_says_what_the_evaluator_scores_and_stops(loaded):
    model, processor = loaded
    pope, choice = testbed.questions("POPE", "test", 61), testbed.questions("ScienceQA", "test", 61)
    scores = Evaluator(model, processor, pope, choice).scores(model)
    for rows, name in ((pope, "pope"), (choice, "choice")):
        batch = encode(processor, [q.prompt for q in rows], [q.image for q in rows])
        ids = model.generate(**batch, do_sample=False, max_new_tokens=5)[
            :, batch["input_ids"].shape[1] :
        ]
        assert tuple(processor.batch_decode(ids, skip_special_tokens=True)) == scores[name].answers
        assert ids.shape[1] == 2  # the answer and the end-of-text token


def test_the_package_stays_small():
    assert sum(file.stat().st_size for file in testbed.WEIGHTS.iterdir()) <= 8_000_000


def _vision_names(folder):
    """Beginnings of the names of the vision tower's weights in a file."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "vision" in name]  # noqa: SIM118 - no mapping
    return {".".join(name.split(".")[:3]) for name in names}


def test_the_vision_tower_is_stored_under_the_hubs_names(loaded, tmp_path):
    """vLLM and others know no other ones for LLaVA; what is saved from the model keeps them."""
    names = _vision_names(testbed.WEIGHTS)
    prefix = "vision_tower.vision_model."
    parts = ("embeddings", "encoder", "post_layernorm", "pre_layrnorm")
    assert names == {f"{prefix}{part}" for part in parts}
    model, processor = loaded
    assert _vision_names(save_pruned(model, tmp_path / "saved", processor)) == names


def test_training_is_deterministic_and_writes_what_load_reads(tmp_path):
    state = torch.random.get_rng_state()
    sizes = dict(
        vision_steps=2,
        fact_steps=2,
        steps=2,
        look_steps=2,
        hidden=16,
        ffn=24,
        layers=2,
        heads=2,
        progress=False,
    )
    losses = [
        testbed.train(tmp_path / name, seed=seed, **sizes)
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    assert torch.equal(state, torch.random.get_rng_state())
    assert losses[0] == losses[1] != losses[2]
    first, second = (testbed.load(folder=tmp_path / name)[0].state_dict() for name in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert _vision_names(tmp_path / "a") == _vision_names(testbed.WEIGHTS)
    with pytest.raises(OutputExistsError):
        testbed.train(tmp_path / "a", **sizes)


@pytest.mark.parametrize("named", [True, False])
def test_a_chat_begins_once_whatever_template_and_tokenizer_add(named):
    from tokenizers.processors import TemplateProcessing

    from hipp_ext.calibration import tokenise

    processor = testbed.load()[1]
    tokenizer = processor.tokenizer
    first, number = tokenizer.bos_token, tokenizer.bos_token_id
    adding = TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, number)]
    )
    tokenizer._tokenizer.post_processor = adding
    if not named:
        tokenizer.bos_token = None
    for texts in (["kite", "a kite"], [f"{first}kite", f"{first}a kite"]):
        ids = tokenise(processor, texts)["input_ids"]
        assert (ids == number).sum(1).tolist() == [1, 1]
