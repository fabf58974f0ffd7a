"""CHAIR: by hand, against the words people use, and on captions that a real model generates."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from vlm_tables import save_llava

from hipp_ext.cli import main
from hipp_ext.errors import DataError
from hipp_ext.evals.captions import coco_task, measure_chair, scenes_task
from hipp_ext.evals.chair import ObjectWords, chair_scores, default_synonyms, plurals, read_synonyms
from hipp_ext.evals.hipp_vlm import HippVLM
from hipp_ext.evals.report.files import read_chair
from hipp_ext.testbed import WEIGHTS, world

NAMES = [
    "person",
    "dog",
    "hot dog",
    "bear",
    "teddy bear",
    "cup",
    "knife",
    "bus",
    "mouse",
    "dining table",
    "scissors",
]
WORDS = ObjectWords(
    default_synonyms(NAMES) | {"person": ["woman", "rider"], "cup": ["coffee mug", "mug"]}
)


# --------------------------------------------------------------------------------------------------
# - words


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("A dog eats a hot dog.", ["dog", "hot dog"]),
        ("Two hot-dogs; THREE Dogs!", ["hot dog", "dog"]),
        ("teddy bears and a bear", ["teddy bear", "bear"]),
        ("People, women and riders", ["person"] * 3),
        ("a coffee mug beside coffee and mugs", ["cup", "cup"]),
        ("knives, buses, mice, scissors", ["knife", "bus", "mouse", "scissors"]),
        ("the dog's dining table", ["dog", "dining table"]),
        ("a table for dogged hotdogs", []),
        ("", []),
    ],
)
def test_words_are_found(text, objects):
    assert WORDS(text) == objects


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("cup", "cups"),
        ("bench", "benches"),
        ("baby", "babies"),
        ("toy", "toys"),
        ("box", "boxes"),
        ("knife", "knives"),
        ("wine glass", "wine glasses"),
        ("teddy bear", "teddy bears"),
        ("sheep", "sheep"),
        ("potato", "potatoes"),
    ],
)
def test_plurals(name, forms):
    assert plurals(name) == (forms,)


def test_what_was_given_goes_before_what_was_guessed():
    words = ObjectWords({"glass": [], "spectacles": ["glasses"]})
    assert words("glasses on a glass") == ["spectacles", "glass"]


def test_synonyms_are_read_from_both_formats(tmp_path):
    (tmp_path / "a.json").write_text('{"person": ["girl", "boy"], "tv": []}')
    (tmp_path / "a.txt").write_text("person, girl, boy\n\ntv\n")
    assert (
        read_synonyms(tmp_path / "a.json")
        == read_synonyms(tmp_path / "a.txt")
        == {"person": ["girl", "boy"], "tv": []}
    )


def test_words_refuse_what_is_ambiguous(tmp_path):
    with pytest.raises(DataError, match="the word 'seat' names two objects, 'chair' and 'bench'"):
        ObjectWords({"chair": ["seat"], "bench": ["seat"]})
    with pytest.raises(DataError, match="the object '!!' has a name without a letter"):
        ObjectWords({"!!": []})
    with pytest.raises(DataError, match="needs the names of the objects to look for"):
        ObjectWords({})
    with pytest.raises(DataError, match="none.txt cannot be read: No such file"):
        read_synonyms(tmp_path / "none.txt")
    for text in ("[1]", "{", '{"a": 1}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DataError, match="a.json is not a list of synonyms"):
            read_synonyms(tmp_path / "a.json")
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(DataError, match="a.txt holds no synonyms"):
        read_synonyms(tmp_path / "a.txt")


# --------------------------------------------------------------------------------------------------
# - scores


def test_chair_by_hand():
    captions = [
        "A woman with a dog and two cups, dogs.",
        "a bus",
        "A mouse and a bear.",
        "Nothing to see.",
    ]
    objects = [{"person", "dog", "knife"}, {"bus"}, {"mouse"}, {"cup", "bus"}]
    own = chair_scores(captions, objects, list("pqrs"), WORDS)
    # Named: person dog CUP dog | bus | mouse BEAR | -: 2 of 7 are not there, in 2 of 4 captions;
    # found 2 of 3, 1, 1, 0 of 2.
    assert own.chair_i == pytest.approx(200 / 7) and own.chair_s == 50
    assert (
        own.recall == pytest.approx(400 / 7)
        and own.silent == 25
        and own.mentions == pytest.approx(7 / 4)
    )
    assert (own.n, own.images) == (4, 4)


def test_silence_is_seen():
    own = chair_scores(["", "no"], [{"cup"}, {"dog"}], ["a", "b"], WORDS)
    assert (own.chair_i, own.chair_s, own.recall, own.silent, own.mentions) == (0, 0, 0, 100, 0)


def test_errors_count_pictures():
    captions, objects = ["a cup", "a dog", "a bear", "a cup and a bus"] * 25, [{"cup"}] * 100
    images = [str(n) for n in range(100)]
    alone = chair_scores(captions, objects, images, WORDS, resamples=4000)
    assert alone.chair_s == 75 and alone.chair_s_se == pytest.approx(
        100 * (0.75 * 0.25 / 100) ** 0.5, rel=0.05
    )
    fourfold = chair_scores(captions * 4, objects * 4, images * 4, WORDS, resamples=4000)
    assert fourfold.chair_s_se == pytest.approx(alone.chair_s_se) and (
        fourfold.n,
        fourfold.images,
    ) == (400, 100)


def test_scores_refuse_what_does_not_fit():
    with pytest.raises(DataError, match=r"one length, above 0; got \[1, 2, 1\]"):
        chair_scores(["a"], [{"cup"}, {"dog"}], ["p"], WORDS)
    with pytest.raises(DataError, match=r"got \[0, 0, 0\]"):
        chair_scores([], [], [], WORDS)
    with pytest.raises(DataError, match="objects that the list of names does not have: zebra"):
        chair_scores(["a cup"], [{"zebra", "cup"}], ["p"], WORDS)


# --------------------------------------------------------------------------------------------------
# - real captions


def test_the_dense_testbed_mostly_says_what_is_there(tmp_path):
    task = scenes_task(60)
    own, file = measure_chair(WEIGHTS, task, work_dir=tmp_path, batch_size=30, device="cpu")
    # Measured on 200 scenes: CHAIR_i 6.4 +- 0.8, CHAIR_s 24.5 +- 3.0, recall 93.6 +- 0.7; four
    # standard errors of 60.
    assert own.chair_i < 13 and own.chair_s < 47 and own.recall > 88 and own.silent == 0
    said = [json.loads(line)["prediction"] for line in file.read_text().splitlines()]
    assert len(set(said)) > 40 and all(
        set(caption.split()) <= set(world.OBJECTS) for caption in said
    )
    shuffled = chair_scores(said, task.objects[1:] + task.objects[:1], task.names, task.words)
    assert (
        shuffled.chair_i > 4 * own.chair_i and shuffled.recall < own.recall - 25
    )  # it looks; captions fit their scenes
    record = json.loads((file.parent / "scores.json").read_text())
    assert (
        record["chair_i"] == own.chair_i and record["settings"]["prompt"] == "Describe the image."
    )
    counts, read = record["counts"], read_chair(file.parent / "scores.json")
    assert read["counts"] == counts and len(set(counts["image"])) == len(counts["named"])
    assert 100 * sum(counts["wrong"]) / sum(counts["named"]) == pytest.approx(own.chair_i)
    assert 100 * sum(counts["found"]) / sum(counts["there"]) == pytest.approx(own.recall)
    assert read["made"]["device"] and read["made"]["versions"]["hipp-ext"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "tiny")


def coco(folder: Path) -> Path:
    """3 pictures with objects and one without, in COCO's formats; the tiny model's words are among
    the objects.
    """
    names = ["red", "square", "green"]
    files = [f"{n}.jpg" for n in range(4)]
    (folder / "pictures").mkdir(parents=True)
    for number, name in enumerate(files):
        Image.new("RGB", (40, 32), ("red", "blue", "green", "white")[number]).save(
            folder / "pictures" / name
        )
    (folder / "instances.json").write_text(
        json.dumps(
            {
                "images": [{"id": n, "file_name": name} for n, name in enumerate(files)],
                "categories": [{"id": n, "name": name} for n, name in enumerate(names)],
                "annotations": [{"image_id": n, "category_id": n} for n in range(3)],
            }
        )
    )
    (folder / "captions.json").write_text(
        json.dumps({"annotations": [{"image_id": 1, "caption": "Reds."}]})
    )
    return folder


def test_coco_pictures_are_sampled_described_and_kept(tmp_path, llava, monkeypatch):
    folder = coco(tmp_path / "coco")
    task = coco_task(
        folder / "instances.json",
        folder / "pictures",
        3,
        captions=folder / "captions.json",
        max_new_tokens=5,
    )
    assert dict(zip(task.names, task.objects, strict=True)) == {
        "0.jpg": ("red",),
        "1.jpg": ("square", "red"),
        "2.jpg": ("green",),
    }
    asked, generate = [], HippVLM.generate_batch

    def stopped(self, messages):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(messages[0][1]["value"])
        return generate(self, messages)

    monkeypatch.setattr(HippVLM, "generate_batch", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure_chair(llava, task, work_dir=tmp_path / "w", batch_size=1, device="cpu")
    monkeypatch.setattr(
        HippVLM, "generate_batch", lambda self, m: asked.append(len(m)) or generate(self, m)
    )
    own, file = measure_chair(llava, task, work_dir=tmp_path / "w", batch_size=8, device="cpu")
    assert asked == ["Provide a brief description of the given image."] * 2 + [
        1
    ]  # what was answered is not asked again
    assert own.n == own.images == 3 and len(file.read_text().splitlines()) == 3
    again, _ = measure_chair(llava, task, work_dir=tmp_path / "w", device="cpu")
    assert again == own and len(asked) == 3


def test_coco_tasks_are_checked(tmp_path, llava):
    folder = coco(tmp_path / "coco")
    with pytest.raises(
        DataError, match="4 images with objects are needed, and there are 3. Lower --n"
    ):
        coco_task(folder / "instances.json", folder / "pictures", 4)
    (folder / "pictures/1.jpg").write_bytes(b"no picture")
    task = coco_task(folder / "instances.json", folder / "pictures", 3)
    with pytest.raises(DataError, match="the image 1.jpg is broken, it cannot be decoded"):
        measure_chair(llava, task, work_dir=tmp_path, device="cpu")
    (folder / "pictures/1.jpg").unlink()
    with pytest.raises(DataError, match="1 of 3 images are missing"):
        coco_task(folder / "instances.json", folder / "pictures", 3)


def hipp(capsys, monkeypatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["hipp", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, *capsys.readouterr()


def test_command_on_the_testbed_and_on_coco(tmp_path, llava, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said, warned = hipp(
        capsys, monkeypatch, "chair", "testbed", "--n", "5", "--device", "cpu"
    )
    assert code == 0 and "CHAIR_i" in said and "captions and scores: outputs/weights-" in said
    assert "toy world" not in warned
    folder = coco(tmp_path / "coco")
    arguments = (
        "--n",
        "2",
        "--annotations",
        str(folder / "instances.json"),
        "--images",
        str(folder / "pictures"),
    )
    code, said, _ = hipp(
        capsys,
        monkeypatch,
        "chair",
        str(llava),
        *arguments,
        "--device",
        "cpu",
        "--max-new-tokens",
        "3",
    )
    assert code == 0 and "CHAIR-coco" in said


def test_the_toy_world_is_named_for_other_models(tmp_path, llava, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *_, warned = hipp(capsys, monkeypatch, "chair", str(llava), "--n", "2", "--device", "cpu")
    assert "drawings of the built-in toy world" in warned and "--annotations" in warned


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("testbed", "--annotations", "a.json"),
            "Give both --annotations and --images, or neither",
        ),
        (
            ("testbed", "--prompt", "What?"),
            "--captions, --synonyms and --prompt need --annotations",
        ),
        (("nowhere",), "nowhere is not a folder"),
        (("testbed", "--dtype", "int8"), "--dtype int8: expected float32, bfloat16 or float16"),
        (("testbed", "--annotations", "a.json", "--images", "."), "a.json cannot be read"),
    ],
)
def test_command_says_what_is_wrong(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, wrong = hipp(capsys, monkeypatch, "chair", *arguments)
    assert code == 2 and message in wrong and len(wrong.strip().splitlines()) <= 2
