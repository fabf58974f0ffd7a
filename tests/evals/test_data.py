"""Benchmark files from annotations, published questions and ScienceQA's own formats: right, whole,
and resumable.
"""

import base64
import io
import json
import os
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hipp_ext.cli import main
from hipp_ext.errors import DataError, MissingExtraError, OutputExistsError
from hipp_ext.evals.data.coco import AnnotatedImage, read_captions, read_instances
from hipp_ext.evals.data.pope import (
    SPLITS,
    build_pope,
    pope_from_annotations,
    pope_from_published,
    write_pope,
)
from hipp_ext.evals.data.scienceqa import write_scienceqa
from hipp_ext.evals.data.writing import Picture, file_pictures, write_table
from hipp_ext.evals.tables import read_table

KINDS = ["person", "dog", "cup", "apple", "car", "bus", "bench", "umbrella", "kite", "tv"]


def save_picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (17, 13), (7 * number % 256, 40, 90)).save(path)


def scene(number: int) -> list[str]:
    """3 to 5 kinds of objects, "person" in most."""
    chosen = [KINDS[(number * step + step) % 10] for step in (1, 3, 7)] + ["person"] * (
        number % 4 > 0
    )
    return list(dict.fromkeys(chosen + KINDS[number % 3 : number % 3 + 2]))[: 3 + number % 3]


def coco(folder: Path, n: int = 20) -> tuple[Path, Path]:
    """An instance file of n pictures, each object annotated twice, and two pictures with too
    little; and the image folder.
    """
    ids = {name: 3 * number + 1 for number, name in enumerate(KINDS)}
    images = [{"id": 900 - i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in range(n + 2)]
    annotations = [
        {"image_id": 900 - i, "category_id": ids[name], "iscrowd": again}
        for again in (0, 1)
        for i in range(n + 2)
        for name in (scene(i) if i < n else KINDS[:2])
    ]
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    file = folder / "instances.json"
    file.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    for i in range(n + 2):
        save_picture(folder / "val2014" / f"COCO_val2014_{i:012d}.jpg", i)
    return file, folder / "val2014"


def by_the_authors(sample: list[AnnotatedImage], strategy: str) -> dict[str, list[str]]:
    """Image to the absent objects that POPE's rules pick, spelled out; an empty string where they
    pick at random.
    """
    frequency, order = Counter(), []
    for image in sample:
        for name in image.objects:
            order.append(name)
            frequency[name] += 1
    picked = {}
    for image in sample:
        picked[image.file_name] = []
        for present in image.objects[:3]:
            seen = Counter(
                o for i in sample if present in i.objects for o in i.objects if o != present
            )
            firsts = [o for i in sample if present in i.objects for o in i.objects]
            ranks = {
                "popular": sorted(
                    frequency, key=lambda name: (-frequency[name], order.index(name))
                ),
                "adversarial": sorted(seen, key=lambda name: (-seen[name], firsts.index(name))),
            }[strategy]
            left = [
                name
                for name in ranks
                if name not in image.objects and name not in picked[image.file_name]
            ]
            picked[image.file_name].append(left[0] if left else "")
    return picked


# --------------------------------------------------------------------------------------------------
# - POPE


def test_built_pope_obeys_the_authors_rules(tmp_path):
    annotations, _ = coco(tmp_path)
    images, names = read_instances(annotations)
    assert names == tuple(KINDS) and len(images) == 22 and images[3].objects == tuple(scene(3))
    questions = build_pope(images, n_images=12, seed=5)
    sample = [
        next(i for i in images if i.file_name == name)
        for name in dict.fromkeys(q.image for q in questions)
    ]
    assert len(sample) == 12 and all(len(image.objects) >= 3 for image in sample)
    for image in sample:
        own = [q for q in questions if q.image == image.file_name]
        assert len({q.text for q in own}) == len(own)
        positive = [q for q in own if q.answer == "Yes"]
        assert [q.text.split()[3] for q in positive] == list(image.objects[:3])
        assert all(q.splits == SPLITS for q in positive)
        for split in SPLITS:
            negative = [q.text.split()[3] for q in own if q.answer == "No" and split in q.splits]
            assert len(negative) == 3 and not set(negative) & set(image.objects)
            if split != "random":
                ruled = by_the_authors(sample, split)[image.file_name]
                assert set(ruled) - {""} <= set(negative)
    assert any("" not in names for names in by_the_authors(sample, "adversarial").values())
    assert {q.text.split()[2] for q in questions if q.text.split()[3] in ("apple", "umbrella")} == {
        "an"
    }
    assert "Is there a person in the image?" in {q.text for q in questions}


def test_popular_and_adversarial_differ_and_are_what_their_names_say():
    cats = [
        AnnotatedImage(id=i, file_name=f"c{i}", objects=("cat", "bowl", "sofa")) for i in range(3)
    ]
    cars = [
        AnnotatedImage(id=i, file_name=f"s{i}", objects=("car", "sign", "tree", "road"))
        for i in range(8)
    ]
    odd = AnnotatedImage(id=99, file_name="odd", objects=("cat", "rug", "lamp"))
    questions = build_pope([*cats, *cars, odd], n_images=12)
    no = {
        split: [
            q.text.split()[3]
            for q in questions
            if q.image == "odd" and q.answer == "No" and split in q.splits
        ]
        for split in SPLITS
    }
    assert set(no["popular"]) < {"car", "sign", "tree", "road"}
    assert {"bowl"} < set(no["adversarial"]) and "bowl" not in no[
        "popular"
    ]  # in 3 of 12 pictures, but with the cat


def test_random_negatives_are_seeded_and_cover_all_absent_objects(tmp_path):
    images, _ = read_instances(coco(tmp_path)[0])
    assert build_pope(images, n_images=19, seed=1) == build_pope(images, n_images=19, seed=1)
    assert build_pope(images, n_images=19, seed=1) != build_pope(images, n_images=19, seed=2)
    asked = Counter(
        q.text
        for seed in range(40)
        for q in build_pope(images, n_images=19, seed=seed)
        if q.image.endswith("0.jpg")
        and q.answer == "No"
        and "random" in q.splits
        and q.image == images[0].file_name
    )
    absent = {name for name in KINDS if name not in images[0].objects}
    assert {text.split()[3] for text in asked} == absent
    assert min(asked.values()) > 0.5 * 40 * 3 / len(
        absent
    )  # uniform: 3 of them in each of 40 draws


def test_pope_tsv_is_what_vlmevalkit_and_our_tables_read(tmp_path):
    annotations, folder = coco(tmp_path)
    questions, source = pope_from_annotations(annotations, n_images=9, seed=2)
    out = write_pope(tmp_path / "out/POPE.tsv", questions, folder, source)
    table = read_table(out, tmp_path / "images", name="POPE")
    assert len(table.frame) == len(questions) and len(set(table.images)) == 9
    assert table.frame["question"][0] == questions[0].text + " Please answer yes or no."
    assert table.frame["category"].tolist() == [",".join(q.splits) for q in questions]
    raw = pd.read_csv(out, sep="\t")
    assert raw.columns.tolist() == ["index", "image", "question", "answer", "category"]
    assert (raw["image"].str.len() > 64).sum() == 9  # each picture once, then by index
    assert base64.b64decode(raw["image"][0]) == (folder / questions[0].image).read_bytes()
    for split in SPLITS:
        own = raw[raw["category"].str.contains(split)]
        assert len(own) == 54 and (own["answer"] == "Yes").sum() == 27
    record = json.loads((tmp_path / "out/POPE.tsv.json").read_text())
    assert record["seed"] == 2 and record["rows"] == len(questions) and record["pictures"] == 9
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "POPE.tsv",
        "POPE.tsv.json",
    ]


def test_vlmevalkit_scores_the_built_pope(tmp_path):
    from hipp_ext.integrations.vlmevalkit_host import import_vlmeval, open_dataset, score

    import_vlmeval()
    annotations, folder = coco(tmp_path)
    out = write_pope(
        tmp_path / "POPE.tsv", build_pope(read_instances(annotations)[0], n_images=6), folder, {}
    )
    dataset = open_dataset(read_table(out, tmp_path / "images", name="POPE"), None)
    table = score(dataset, dataset.data["answer"].tolist(), tmp_path / "kept")
    assert {split: row["Overall"] for split, row in table.items()} == dict.fromkeys(
        ("Overall", *SPLITS), 100.0
    )


def published(folder: Path, **changes: list[tuple[str, str, str]]) -> Path:
    rows = {
        "random": [
            ("a.jpg", "cup", "yes"),
            ("a.jpg", "kite", "no"),
            ("b.jpg", "dog", "yes"),
            ("b.jpg", "car", "no"),
        ],
        "popular": [
            ("a.jpg", "cup", "yes"),
            ("a.jpg", "car", "no"),
            ("b.jpg", "dog", "yes"),
            ("b.jpg", "car", "no"),
        ],
        "adversarial": [
            ("a.jpg", "cup", "yes"),
            ("a.jpg", "dog", "no"),
            ("b.jpg", "dog", "yes"),
            ("b.jpg", "cup", "no"),
        ],
    } | changes
    folder.mkdir(exist_ok=True)
    for split, lines in rows.items():
        text = [
            json.dumps(
                {
                    "question_id": n,
                    "image": image,
                    "text": f"Is there a {name} in the image?",
                    "label": label,
                }
            )
            for n, (image, name, label) in enumerate(lines, 1)
        ]
        (folder / f"coco_pope_{split}.json").write_text("\n".join(text) + "\n" * bool(text))
    for number, name in enumerate(("a.jpg", "b.jpg")):
        save_picture(folder / "images" / name, number)
    return folder


def test_published_questions_are_merged_with_their_splits(tmp_path):
    questions, source = pope_from_published(published(tmp_path))
    found = {(q.image, q.text.split()[3]): (q.answer, ",".join(q.splits)) for q in questions}
    assert found == {
        ("a.jpg", "cup"): ("Yes", "random,popular,adversarial"),
        ("a.jpg", "kite"): ("No", "random"),
        ("a.jpg", "car"): ("No", "popular"),
        ("a.jpg", "dog"): ("No", "adversarial"),
        ("b.jpg", "dog"): ("Yes", "random,popular,adversarial"),
        ("b.jpg", "car"): ("No", "random,popular"),
        ("b.jpg", "cup"): ("No", "adversarial"),
    }
    assert [q.image for q in questions] == ["a.jpg"] * 4 + ["b.jpg"] * 3
    assert set(source["files"]) == {f"coco_pope_{split}.json" for split in SPLITS}
    out = write_pope(tmp_path / "POPE.tsv", questions, tmp_path / "images", source, ending="")
    assert read_table(out, tmp_path / "i").frame["question"][0] == "Is there a cup in the image?"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"popular": [("a.jpg", "cup", "no")]},
            "'Is there a cup in the image\\?' about a.jpg is No, and elsewhere Yes",
        ),
        (
            {"popular": [("a.jpg", "cup", "maybe")]},
            "line 1: the label is 'maybe'; it must be yes or no",
        ),
        ({"popular": []}, "coco_pope_popular.json is empty"),
    ],
)
def test_published_questions_are_checked(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        pope_from_published(published(tmp_path, **change))


def test_published_files_must_be_there_and_readable(tmp_path):
    with pytest.raises(
        DataError, match="one file like coco_pope_random.json is needed, and there is: none"
    ):
        pope_from_published(tmp_path)
    published(tmp_path)
    (tmp_path / "coco_pope_popular.json").write_text('{"image": "a.jpg"}\n')
    with pytest.raises(DataError, match="popular.json, line 1 is not a POPE question"):
        pope_from_published(tmp_path)
    (tmp_path / "gqa_pope_popular.json").write_text("")
    with pytest.raises(DataError, match="there is: coco_pope_popular.json, gqa_pope_popular.json"):
        pope_from_published(tmp_path)


# ------------------------------------------------------------------------------------- annotations
# that are wrong


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (
            "annotations",
            [{"image_id": 1, "category_id": 77}],
            "1 annotations refer to an unknown category, .* category 77; 1 are",
        ),
        (
            "annotations",
            [{"image_id": 5, "category_id": 1}],
            "refer to an unknown image, the first to image 5",
        ),
        ("annotations", [], "the list annotations is empty"),
        ("images", [], "the list images is empty"),
        ("categories", [], "the list categories is empty"),
        ("categories", [{"id": 1, "name": ""}], "a category or a file name is empty"),
        ("images", [{"id": 1}], "is not a COCO instance file: KeyError\\('file_name'\\)"),
        ("images", 7, "is not a COCO instance file"),
    ],
)
def test_instances_are_checked(tmp_path, part, value, message):
    good = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "category_id": 1}],
        "categories": [{"id": 1, "name": "cup"}],
    }
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(good))
    assert read_instances(file)[0][0].objects == ("cup",)
    file.write_text(json.dumps(good | {part: value}))
    with pytest.raises(DataError, match=message):
        read_instances(file)


def test_unreadable_json_is_named(tmp_path):
    with pytest.raises(DataError, match="none.json cannot be read: No such file"):
        read_instances(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(DataError, match="cut.json is not valid JSON"):
        read_captions(tmp_path / "cut.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match="is not a COCO caption file"):
        read_captions(tmp_path / "list.json")
    (tmp_path / "bare.json").write_text('{"annotations": []}')
    with pytest.raises(DataError, match="the list annotations is empty"):
        read_captions(tmp_path / "bare.json")


def test_too_few_objects_are_refused(tmp_path):
    images, _ = read_instances(coco(tmp_path)[0])
    with pytest.raises(
        DataError, match="20 images with 3 kinds of objects or more are needed, and 19 of the 22"
    ):
        build_pope(images, n_images=20)
    full = [AnnotatedImage(id=1, file_name="full.jpg", objects=("cup", "dog", "car"))]
    with pytest.raises(
        DataError, match="full.jpg: 3 absent objects are needed, and it lacks only 0 of the 3 kinds"
    ):
        build_pope(full, n_images=1)
    with pytest.raises(DataError, match="at least 1 image and 1 object per image, not 0 and 3"):
        build_pope(images, n_images=0)


# --------------------------------------------------------------------------------------------------
# - pictures


def test_missing_and_escaping_pictures_are_named(tmp_path):
    save_picture(tmp_path / "in/a.jpg", 1)
    save_picture(tmp_path / "secret.jpg", 1)
    with pytest.raises(DataError, match="2 of 3 images are missing in .*in, the first is b.jpg"):
        file_pictures(tmp_path / "in", ["a.jpg", "b.jpg", "c.jpg", "b.jpg"])
    with pytest.raises(DataError, match=r"'\.\./secret.jpg' leads out of the image folder"):
        file_pictures(tmp_path / "in", ["../secret.jpg"])
    with pytest.raises(DataError, match="there is no image folder .*nowhere"):
        file_pictures(tmp_path / "nowhere", ["a.jpg"])


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"hello", lambda data: b""]
)
def test_a_broken_picture_leaves_no_output(tmp_path, damage):
    annotations, folder = coco(tmp_path)
    questions = build_pope(read_instances(annotations)[0], n_images=12)
    victim = folder / questions[-1].image
    victim.write_bytes(damage(victim.read_bytes()))
    with pytest.raises(DataError, match=f"the image {victim.name} is broken, it cannot be decoded"):
        write_pope(tmp_path / "POPE.tsv", questions, folder, {})
    assert not (tmp_path / "POPE.tsv").exists()


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "in/a.jpg").mkdir(parents=True)
    with pytest.raises(DataError, match="the image a.jpg cannot be read: .*Is a directory"):
        write_table(
            tmp_path / "out.tsv",
            [{"index": 0}],
            file_pictures(tmp_path / "in", ["a.jpg"]),
            source={},
        )


def counted(
    folder: Path, names: list[str], calls: list[str], stop_at: int | None = None
) -> list[Picture]:
    """The pictures of a folder, which note that they are read, and stop the run at one of them as
    ctrl-C does.
    """

    def read(picture: Picture) -> bytes:
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(picture.name)
        return picture.read()

    found = file_pictures(folder, names)
    return [Picture(name=p.name, stamp=p.stamp, read=lambda p=p: read(p)) for p in found]


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path):
    names = [f"{n}.png" for n in range(6)]
    for number, name in enumerate(names):
        save_picture(tmp_path / "in" / name, number)
    rows = [{"index": n, "question": f'a "b"\tc\nd {n}'} for n in range(7)]
    order = [names[n] for n in (0, 0, 1, 2, 3, 4, 5)]
    whole = write_table(
        tmp_path / "whole.tsv", rows, counted(tmp_path / "in", order, []), source={"a": 1}
    )
    out, calls = tmp_path / "out.tsv", []
    with pytest.raises(KeyboardInterrupt):
        write_table(out, rows, counted(tmp_path / "in", order, calls, stop_at=4), source={"a": 1})
    assert not out.exists() and calls == names[:4]
    partial = tmp_path / ".out.tsv.partial"
    partial.write_bytes(partial.read_bytes()[:-20])  # the crash cut the last line
    again: list[str] = []
    write_table(out, rows, counted(tmp_path / "in", order, again), source={"a": 1})
    assert again == names[3:] and out.read_bytes() == whole.read_bytes() and not partial.exists()
    assert pd.read_csv(out, sep="\t")["question"].tolist() == [row["question"] for row in rows]
    idle: list[str] = []
    write_table(out, rows, counted(tmp_path / "in", order, idle), source={"a": 1})
    assert idle == []  # what is there already is not made again


def test_a_partial_file_of_other_input_is_not_used(tmp_path):
    names = ["0.png", "1.png", "2.png"]
    for number, name in enumerate(names):
        save_picture(tmp_path / "in" / name, number)
    rows = [{"index": n} for n in range(3)]
    with pytest.raises(KeyboardInterrupt):
        write_table(
            tmp_path / "out.tsv", rows, counted(tmp_path / "in", names, [], stop_at=2), source={}
        )
    save_picture(tmp_path / "in/0.png", 200)
    os.utime(tmp_path / "in/0.png", (1, 1))
    calls: list[str] = []
    write_table(tmp_path / "out.tsv", rows, counted(tmp_path / "in", names, calls), source={})
    assert calls == names
    assert (
        base64.b64decode(pd.read_csv(tmp_path / "out.tsv", sep="\t")["image"][0])
        == (tmp_path / "in/0.png").read_bytes()
    )


def test_another_file_is_kept_unless_asked(tmp_path):
    save_picture(tmp_path / "in/a.png", 1)
    pictures = file_pictures(tmp_path / "in", ["a.png"])
    out = write_table(tmp_path / "out.tsv", [{"index": 0, "answer": "Yes"}], pictures, source={})
    before = out.read_bytes()
    with pytest.raises(OutputExistsError, match="out.tsv exists"):
        write_table(out, [{"index": 0, "answer": "No"}], pictures, source={})
    assert out.read_bytes() == before
    write_table(out, [{"index": 0, "answer": "No"}], pictures, source={}, overwrite=True)
    assert pd.read_csv(out, sep="\t")["answer"].tolist() == ["No"]
    out.write_text(
        "edited"
    )  # the record beside it still has the key, but this is not the file it speaks of
    with pytest.raises(OutputExistsError, match="out.tsv exists"):
        write_table(out, [{"index": 0, "answer": "No"}], pictures, source={})
    with pytest.raises(DataError, match="there is nothing to write"):
        write_table(tmp_path / "none.tsv", [], [], source={})


# --------------------------------------------------------------------------------------------------
# - ScienceQA


def problems() -> dict[str, dict]:
    """Problems of every shape: 2 to 4 choices, with and without picture and hint, an option that
    pandas would drop.
    """
    choices = [
        ["red", "blue"],
        ["east", "west", "north", "south"],
        ["1 g", "NA", "3 kg"],
        ["yes", "no"],
        ["a", "b", "c"],
    ]
    return {
        str(11 * n): {
            "question": f"Which one is it?\nLook, {n}",
            "choices": choices[n],
            "answer": n % 2,
            "hint": "A\r\nhint\t." * (n % 2),
            "image": None if n == 3 else "image.png",
            "task": "closed choice",
            "grade": "grade2",
            "subject": ("natural science", "social science")[n % 2],
            "topic": ("physics", "geography")[n % 2],
            "category": "c",
            "skill": "s",
            "lecture": "",
            "solution": "",
            "split": "test" if n < 4 else "val",
        }
        for n in range(5)
    }


def original(folder: Path) -> Path:
    known = problems()
    splits = {
        split: [pid for pid, own in known.items() if own["split"] == split]
        for split in ("val", "test")
    }
    (folder / "problems.json").write_text(json.dumps(known))
    (folder / "pid_splits.json").write_text(json.dumps(splits | {"train": []}))
    for pid, own in known.items():
        if own["image"]:
            save_picture(folder / "images" / own["split"] / pid / "image.png", int(pid))
    return folder


def hub(folder: Path) -> Path:
    """The same problems as parquet, with pictures inside, in two files and small row groups."""
    (folder / "data").mkdir()
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split, name in (("val", "validation"), ("test", "test")):
        rows = [(pid, own) for pid, own in problems().items() if own["split"] == split]
        for part, some in enumerate((rows[:2], rows[2:])):
            cells = []
            for pid, own in some:
                buffer = io.BytesIO()
                Image.new("RGB", (17, 13), (7 * int(pid) % 256, 40, 90)).save(buffer, "PNG")
                cells.append(
                    {"bytes": buffer.getvalue(), "path": "image.png"} if own["image"] else None
                )
            columns = {
                name: [own[name] for _, own in some]
                for name in ("question", "hint", "topic", "subject", "grade")
            }
            columns["choices"] = pa.array(
                [own["choices"] for _, own in some], pa.list_(pa.string())
            )
            columns["answer"] = pa.array([own["answer"] for _, own in some], pa.int8())
            table = pa.table({"image": pa.array(cells, struct), **columns})
            pq.write_table(
                table,
                folder / f"data/{name}-{part:05d}-of-00002-0123456789abcdef.parquet",
                row_group_size=1,
            )
    return folder


def test_scienceqa_from_its_own_files(tmp_path):
    val, test = write_scienceqa(original(tmp_path), tmp_path / "lmu")
    assert (val.name, test.name) == ("ScienceQA_VAL.tsv", "ScienceQA_TEST.tsv")
    raw = pd.read_csv(test, sep="\t")
    assert raw.columns.tolist() == [
        "index",
        "image",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "l2-category",
        "split",
    ]
    assert raw["index"].tolist() == [0, 11, 22] and raw["answer"].tolist() == ["A", "B", "A"]
    assert raw["D"].isna().tolist() == [True, False, True] and raw["B"].tolist() == [
        "blue",
        "west",
        "NA.",
    ]
    assert raw["question"][1] == "Which one is it?\nLook, 1" and raw["hint"].isna().tolist() == [
        True,
        False,
        True,
    ]
    assert raw["category"].tolist() == ["physics", "geography", "physics"]
    assert raw["l2-category"][0] == "natural science" and set(raw["split"]) == {"test"}
    assert base64.b64decode(raw["image"][1]) == (tmp_path / "images/test/11/image.png").read_bytes()
    table = read_table(test, tmp_path / "pictures", name="ScienceQA_TEST")
    assert table.without_image == 0 and len(set(table.images)) == 3
    assert (
        json.loads((tmp_path / "lmu/ScienceQA_TEST.tsv.json").read_text())["options_with_a_stop"]
        == 1
    )
    assert "D" not in pd.read_csv(val, sep="\t")


def test_scienceqa_from_the_hub_holds_the_same(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    ours = write_scienceqa(original(tmp_path / "a"), tmp_path / "lmu-a")
    theirs = write_scienceqa(hub(tmp_path / "b"), tmp_path / "lmu-b")
    for one, other in zip(ours, theirs, strict=True):
        a, b = pd.read_csv(one, sep="\t"), pd.read_csv(other, sep="\t")
        pd.testing.assert_frame_equal(a.drop(columns="index"), b.drop(columns="index"))
    assert pd.read_csv(theirs[1], sep="\t")["index"].tolist() == [
        0,
        1,
        2,
    ]  # row numbers, since the hub keeps no ids


def test_vlmevalkit_scores_the_built_scienceqa(tmp_path):
    from hipp_ext.integrations.vlmevalkit_host import import_vlmeval, open_dataset, score

    import_vlmeval()
    (file,) = write_scienceqa(original(tmp_path), tmp_path / "lmu", ["test"])
    dataset = open_dataset(read_table(file, tmp_path / "images", name="ScienceQA_TEST"), None)
    text = dataset.build_prompt(1)[1]["value"]
    assert text.startswith("Hint: A") and "D. south\n" in text
    (row,) = score(dataset, ["A", "B", "C"], tmp_path / "kept").values()
    assert (
        row["Overall"] == pytest.approx(200 / 3)
        and row["geography"] == 100
        and row["physics"] == 50
    )


def test_scienceqa_goes_on_with_the_split_that_is_not_done(tmp_path):
    source = original(tmp_path)
    write_scienceqa(source, tmp_path / "lmu", ["val"])
    before = (tmp_path / "lmu/ScienceQA_VAL.tsv").stat().st_mtime_ns
    write_scienceqa(source, tmp_path / "lmu")
    assert (tmp_path / "lmu/ScienceQA_VAL.tsv").stat().st_mtime_ns == before
    assert (tmp_path / "lmu/ScienceQA_TEST.tsv").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"choices": ["one"]},
            "problem 11: the choices must be 2 to 26 texts, and are \\['one'\\]",
        ),
        ({"answer": 4}, "problem 11: the answer is 4; it must be the number of one of 4 choices"),
        ({"answer": "B"}, "problem 11: the answer is 'B'"),
        ({"topic": ""}, "problem 11 has no topic"),
        ({"question": None}, "problem 11 has no question"),
        (
            {"image": "other.png"},
            "1 of 3 images are missing in .*images, the first is test/11/other.png",
        ),
        ({"image": "../../../../x"}, "leads out of the image folder"),
    ],
)
def test_scienceqa_problems_are_checked(tmp_path, change, message):
    known = json.loads((original(tmp_path) / "problems.json").read_text())
    known["11"] |= change
    (tmp_path / "problems.json").write_text(json.dumps(known))
    with pytest.raises(DataError, match=message):
        write_scienceqa(tmp_path, tmp_path / "lmu", ["test"])
    assert not (tmp_path / "lmu").exists()


def test_scienceqa_refuses_what_is_not_there(tmp_path):
    with pytest.raises(
        DataError, match="holds neither problems.json .* nor parquet files of the split validation"
    ):
        write_scienceqa(tmp_path, tmp_path / "lmu")
    with pytest.raises(DataError, match="unknown split 'dev'; known: val, test"):
        write_scienceqa(tmp_path, tmp_path / "lmu", ["dev"])
    original(tmp_path)
    (tmp_path / "pid_splits.json").write_text(json.dumps({"val": ["404"], "test": ["33"]}))
    with pytest.raises(
        DataError, match="pid_splits.json lists problem '404', which problems.json does not have"
    ):
        write_scienceqa(tmp_path, tmp_path / "lmu", ["val"])
    with pytest.raises(DataError, match="none of the 1 questions of the split test has a picture"):
        write_scienceqa(tmp_path, tmp_path / "lmu", ["test"])
    (tmp_path / "pid_splits.json").write_text("{}")
    with pytest.raises(DataError, match="pid_splits.json has no list 'val'"):
        write_scienceqa(tmp_path, tmp_path / "lmu")


def test_damaged_parquet_is_named(tmp_path):
    file = tmp_path / "test-00000-of-00001.parquet"
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="test-00000-of-00001.parquet is not a whole parquet file"):
        write_scienceqa(tmp_path, tmp_path / "lmu", ["test"])
    pq.write_table(pa.table({"question": ["q"], "image": ["x"]}), file)
    with pytest.raises(
        DataError,
        match="has no column choices, answer, hint, topic, subject; it has question, image",
    ):
        write_scienceqa(tmp_path, tmp_path / "lmu", ["test"])
    texts = {name: ["x"] for name in ("question", "hint", "topic", "subject", "image")}
    pq.write_table(pa.table({**texts, "choices": [["a", "b"]], "answer": [0]}), file)
    with pytest.raises(DataError, match="the column image does not hold pictures as bytes, but x"):
        write_scienceqa(tmp_path, tmp_path / "lmu", ["test"])
    (tmp_path / "IMG").mkdir()
    (tmp_path / "IMG/test-00000-of-00001.parquet").write_bytes(file.read_bytes())
    with pytest.raises(
        DataError, match=r"several versions of the split test: \., IMG. Name one of these folders"
    ):
        write_scienceqa(tmp_path, tmp_path / "lmu", ["test"])


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    hub(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        MissingExtraError,
        match=r'pyarrow is not installed. Install it with: pip install "hipp-ext\[data\]"',
    ):
        write_scienceqa(tmp_path, tmp_path / "lmu")


def test_broken_picture_in_parquet_is_named(tmp_path):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([None, {"bytes": b"no picture", "path": None}], struct)
    texts = {name: ["x", "x"] for name in ("question", "hint", "topic", "subject")}
    pq.write_table(
        pa.table({"image": cells, **texts, "choices": [["a", "b"]] * 2, "answer": [0, 1]}),
        tmp_path / "test.parquet",
    )
    with pytest.raises(DataError, match="the image test.parquet, row 1 is broken"):
        write_scienceqa(tmp_path, tmp_path / "lmu", ["test"])


# --------------------------------------------------------------------------------------------------
# - commands


def hipp(capsys, monkeypatch, cwd: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, run in this process: a process of its own takes
    seconds to import.
    """
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["hipp", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, *capsys.readouterr()


def test_commands_build_the_files(tmp_path, capsys, monkeypatch):
    coco(tmp_path)
    original(tmp_path)
    made = (
        "data",
        "pope",
        "--coco-annotations",
        "instances.json",
        "--images",
        "val2014",
        "--n",
        "10",
        "-o",
        "lmu/POPE.tsv",
    )
    code, said, _ = hipp(capsys, monkeypatch, tmp_path, *made)
    assert code == 0 and "questions about 10 images (random 60, popular 60, adversarial 60)" in said
    assert hipp(capsys, monkeypatch, tmp_path, *made)[0] == 0  # there already
    code, _, wrong = hipp(capsys, monkeypatch, tmp_path, *made, "--seed", "1")
    assert code == 2 and "lmu/POPE.tsv exists" in wrong
    assert hipp(capsys, monkeypatch, tmp_path, "data", "scienceqa", ".", "-o", "lmu")[0] == 0
    assert sorted(path.name for path in (tmp_path / "lmu").glob("*.tsv")) == [
        "POPE.tsv",
        "ScienceQA_TEST.tsv",
        "ScienceQA_VAL.tsv",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pope", "--images", "x", "-o", "P.tsv"), "Give one of --coco-annotations"),
        (
            ("pope", "--images", "x", "-o", "P.tsv", "--published", "."),
            "one file like coco_pope_random.json is needed",
        ),
        (("scienceqa", ".", "-o", "lmu"), "holds neither problems.json"),
    ],
)
def test_commands_say_what_is_wrong(tmp_path, capsys, monkeypatch, arguments, message):
    code, _, wrong = hipp(capsys, monkeypatch, tmp_path, "data", *arguments)
    assert code == 2 and message in wrong and len(wrong.strip().splitlines()) <= 2
