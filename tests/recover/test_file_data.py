"""Rows of files as training data: which rows, in which order, encoded when they are needed."""

import base64
import io
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import build
from transformers import AutoTokenizer

from hipp_ext import Calibration, testbed
from hipp_ext.calibration.row_file import open_rows
from hipp_ext.errors import CalibrationError, DataError
from hipp_ext.recover import FileData
from hipp_ext.recover.order import epoch_groups, fill_bins
from hipp_ext.testbed.model import build_processor

WORDS = ["cup", "table", "dog", "chair", "lamp", "book", "tree", "car"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(testbed.WEIGHTS)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def texts(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    sizes = (rng.randrange(3, 30) for _ in range(count))
    return [{"text": f"{n} " + " ".join(rng.choices(WORDS, k=k))} for n, k in enumerate(sizes)]


def lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def taken(data: FileData, steps: int, workers: int = 1, start: int = 0) -> list[list[int]]:
    """For each step the rows that all processes take."""
    streams = [data.batches(rank, workers, start) for rank in range(workers)]
    return [[row for s in streams for b in next(s) for row in b.rows] for _ in range(steps)]


def same(one, other) -> bool:
    return all(
        a.rows == b.rows and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(one, other, strict=True)
    )


# --------------------------------------------------------------------------------- rows of files


ROWS = [
    {"text": 'a } ] " \\ b'},
    {"text": "c", "more": [1, {"x": "]"}]},
    {"text": "\\"},
    {"messages": [{"role": "user", "content": "é"}]},
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.jsonl", "\n\n".join(map(json.dumps, ROWS))),
        ("lines.json", "\n".join(map(json.dumps, ROWS)) + "\n"),
        ("list.json", json.dumps(ROWS)),
        ("indented.json", " " + json.dumps(ROWS, indent=2, ensure_ascii=False)),
    ],
)
def test_the_rows_of_a_file_in_any_order(tmp_path, name, content):
    (tmp_path / name).write_text(content, "utf-8")
    rows = open_rows(tmp_path / name, lambda: 1)
    assert [rows.read(i) for i in (2, 0, 3, 1)] == [ROWS[i] for i in (2, 0, 3, 1)]
    other = open_rows(lines(tmp_path / "turned.jsonl", ROWS[::-1]), lambda: 1)
    if name == "lines.jsonl":  # digests do not depend on the place of a row
        turned = open_rows(lines(tmp_path / "again.jsonl", ROWS), lambda: 1).digests[::-1]
        assert other.digests.tolist() == turned.tolist()


def test_values_that_are_no_objects_are_rows_too(tmp_path):
    (tmp_path / "a.json").write_text('[1, "x, ]", null, {"text": "y"}, [[2], {}], -1.5e3]')
    rows = open_rows(tmp_path / "a.json", lambda: 1)
    assert [rows.read(i) for i in range(len(rows.sizes))] == [
        1,
        "x, ]",
        None,
        {"text": "y"},
        [[2], {}],
        -1500.0,
    ]
    (tmp_path / "b.json").write_text('{\n "text": "z"\n}')
    assert open_rows(tmp_path / "b.json", lambda: 1).read(0) == {"text": "z"}


def table(folder: Path) -> Path:
    rows = ["index\tquestion\tanswer\tcategory\timage"]
    for number, question in enumerate(testbed.questions("POPE", "calibration", 16)):
        question.image.save(buffer := io.BytesIO(), "PNG")
        picture = base64.b64encode(buffer.getvalue()).decode()
        rows.append(f"{number}\t{question.prompt}\t{question.answer}\trandom\t{picture}")
    (folder / "questions.tsv").write_text("\n".join(rows) + "\n")
    return folder / "questions.tsv"


def test_a_table_is_read_like_calibration_reads_it(tmp_path, processor):
    file = table(tmp_path)
    data = FileData(file, processor, batch_size=4)
    for batch in itertools.chain(*itertools.islice(data.batches(0, 1, 0), 3)):
        assert batch["pixel_values"].shape[0] == len(batch.rows)
    whole = Calibration.from_file(file, processor, rows=10**6, batch_size=1)
    found = {str(row): b for b in whole.batches for row in b["input_ids"].tolist()}
    one = FileData(file, processor, batch_size=1)
    for (batch,) in itertools.islice(one.batches(0, 1, 0), 4):
        known = found[str(batch["input_ids"][0].tolist())]
        assert torch.equal(known["labels"], batch["labels"])


def test_rows_of_a_table_that_name_the_picture_of_another(tmp_path):
    picture = testbed.questions("POPE", "calibration", 1)[0].image
    picture.save(buffer := io.BytesIO(), "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    (tmp_path / "t.tsv").write_text(
        f'index\tquestion\tanswer\timage\n7\t"a\nb"\tYes\t{text}\n\n8\tc\tNo\t7\n9\td\tNo\t\n'
    )
    rows = open_rows(tmp_path / "t.tsv", lambda: 1)
    first, second, third = (rows.read(i) for i in range(3))
    assert first["question"] == "a\nb" and first["image"] == {"base64": text} == second["image"]
    assert third == {"index": "9", "question": "d", "answer": "No"}


def test_a_saved_data_set(tmp_path, tokenizer):
    from datasets import Dataset

    rows = texts(6)
    Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    read = open_rows(tmp_path / "set", lambda: 1)
    assert [read.read(i) for i in range(6)] == rows and len(set(read.digests.tolist())) == 6
    assert sorted(sum(taken(FileData(tmp_path / "set", tokenizer, batch_size=2), 3), [])) == [
        *range(1, 7)
    ]


def test_a_plain_text_is_cut_at_spaces_and_all_of_it_is_there(tmp_path, tokenizer):
    text = " ".join(random.Random(0).choices(["cup", "dög", "table\n", "x"], k=3000))
    (tmp_path / "a.txt").write_text(text, "utf-8")
    rows = open_rows(tmp_path / "a.txt", lambda: 100)
    pieces = [rows.read(i)["text"] for i in range(len(rows.sizes))]
    assert "".join(pieces) == text and all(p[-1] in " \n" for p in pieces[:-1])
    data = FileData(tmp_path / "a.txt", tokenizer, sequence_length=32, batch_size=4)
    sizes = [
        b["input_ids"].shape[1] for own in itertools.islice(data.batches(0, 1, 0), 8) for b in own
    ]
    assert max(sizes) == 32 and np.mean(sizes) > 24
    (tmp_path / "b.txt").write_text("é" * 500, "utf-8")
    rows = open_rows(tmp_path / "b.txt", lambda: 33)
    assert "".join(rows.read(i)["text"] for i in range(len(rows.sizes))) == "é" * 500


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}', "is not valid JSON: it ends too early"),
        ("a.json", b'[{"text": "a"}] {}', "is not valid JSON: something follows its end"),
        ("a.json", b"", "has no rows"),
        ("a.jsonl", b"\n\n", "has no rows"),
        ("a.tsv", b"a\tb\n1\t2\n", "has the column question; this one has a, b"),
        ("a.tsv", b"question\n\xff\n", "cannot be read as a table"),
        ("a.csv", b"x", "is of no kind that is read"),
        ("a.txt", b"", "has no rows"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((CalibrationError, DataError), match=message):
        open_rows(tmp_path / name, lambda: 1)


def test_a_file_that_changes_is_noticed(tmp_path, tokenizer):
    file = lines(tmp_path / "a.jsonl", texts(8))
    data = FileData(file, tokenizer, batch_size=8)
    lines(file, texts(8, seed=1))
    with pytest.raises(CalibrationError, match="was changed while it was read"):
        next(data.batches(0, 1, 0))


def test_nothing_of_a_large_file_is_held(tmp_path):
    row = json.dumps({"text": "x" * 1000}) + "\n"
    (tmp_path / "a.jsonl").write_text(row * 20_000)
    rows = open_rows(tmp_path / "a.jsonl", lambda: 1)
    held = sum(a.nbytes for a in (rows.starts, rows.sizes, rows.digests))
    assert held == 24 * 20_000 and rows.read(19_999) == json.loads(row)


# ----------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_an_epoch_has_every_row_once_and_no_two_processes_share_one(tmp_path, tokenizer, workers):
    data = FileData(lines(tmp_path / "a.jsonl", texts(26)), tokenizer, batch_size=4, seed=5)
    steps = 26 // (4 * workers)
    found = sum(taken(data, steps, workers), [])
    assert len(found) == len(set(found)) == steps * 4 * workers
    again, later = taken(data, steps, workers), taken(data, steps, workers, start=steps)
    assert sum(again, []) == found != sum(later, [])
    other = FileData(lines(tmp_path / "a.jsonl", texts(26)), tokenizer, batch_size=4, seed=6)
    assert sum(taken(other, steps, workers), []) != found


def test_a_run_begins_at_any_step_without_encoding_the_rows_before(tmp_path, tokenizer):
    data = FileData(lines(tmp_path / "a.jsonl", texts(40)), tokenizer, batch_size=3)
    undisturbed = list(itertools.islice(data.batches(1, 2, 0), 20))
    fresh = FileData(tmp_path / "a.jsonl", tokenizer, batch_size=3)
    read: list[int] = []
    fresh._encoder = replace(fresh._encoder, file=Watched(fresh.file, read))
    assert same(next(fresh.batches(1, 2, 17)), undisturbed[17])
    assert len(read) <= 6  # of step 17, and of the next one, which is made ahead


class Watched:
    """Rows of a file, and which of them were read."""

    def __init__(self, rows, numbers: list[int]):
        self.rows, self.numbers = rows, numbers

    def read(self, number: int):
        self.numbers.append(number)
        return self.rows.read(number)


def test_rows_of_a_batch_are_of_similar_size():
    sizes = np.random.default_rng(0).integers(1, 1000, 5000)
    groups = epoch_groups(np.arange(5000), sizes, 8, 0, 0)
    assert groups.shape == (625, 8) and len(np.unique(groups)) == 5000
    spread = np.ptp(sizes[groups], axis=1).mean()
    assert spread < 40, spread  # of 1000; about 780 without sorting


def test_bins_are_full_and_hold_everything():
    tokens = [5, 5, 3, 9, 12, 1, 1]
    assert fill_bins(tokens, 10) == [0, 2, 3, 4, 5]


# ---------------------------------------------------------------------------------- poisoned rows


def test_poisoned_rows_are_named_replaced_and_the_same_everywhere(tmp_path, processor):
    asked = testbed.questions("POPE", "calibration", 12)
    rows = []
    for number, question in enumerate(asked):
        question.image.save(tmp_path / f"{number}.png")
        part = {"type": "image", "image": f"{number}.png"}
        content = [part, {"type": "text", "text": question.prompt}]
        answer = {"role": "assistant", "content": question.answer}
        rows.append({"messages": [{"role": "user", "content": content}, answer]})
    (tmp_path / "2.png").write_bytes(b"no picture")
    rows[4]["messages"][1]["content"] = ""
    rows[5]["messages"][0]["content"][1]["text"] = "word " * 200
    rows[6]["messages"][0]["content"][0]["image"] = "../secret.png"
    file = lines(tmp_path / "a.jsonl", rows)
    text = file.read_text().splitlines(keepends=True)
    text[8] = "{half\n"
    file.write_text("".join(text))

    def made() -> FileData:
        return FileData(file, processor, sequence_length=100, batch_size=3)

    data = made()
    epoch = [list(itertools.islice(data.batches(rank, 2, 0), 2)) for rank in range(2)]
    assert sorted(data.skipped) == [3, 5, 6, 7, 9]
    for row, reason in {
        3: "it is no picture of a kind that is read",
        5: "it has no answer",
        6: "its answer begins after 100 tokens",
        7: "is not below the image folder",
        9: "it is not valid JSON",
    }.items():
        assert reason in data.skipped[row]
    used = [row for own in epoch for step in own for batch in step for row in batch.rows]
    assert not set(used) & set(data.skipped) and len(used) == 12
    assert used.count(4) == 2 and used.count(8) == 4  # instead of rows 3, and of 5 to 7
    # A process that began later takes the same rows, and names those that it met.
    fresh = made()
    assert same(next(fresh.batches(1, 2, 1)), epoch[1][1])
    assert set(fresh.skipped.items()) <= set(data.skipped.items())


def test_a_file_without_a_row_that_can_be_used(tmp_path, tokenizer):
    rows = [{"messages": [{"role": "user", "content": "hello"}]}] * 4
    data = FileData(lines(tmp_path / "a.jsonl", rows), tokenizer, batch_size=2)
    with pytest.raises(CalibrationError, match=r"none of 4 rows .* row 1: it has no answer"):
        next(data.batches(0, 1, 0))


# ------------------------------------------------------------------------------- held-out rows


def test_whether_a_row_is_held_out_follows_from_the_row_alone(tmp_path, tokenizer):
    rows = texts(200)
    data = FileData(lines(tmp_path / "a.jsonl", rows), tokenizer, holdout=0.2, batch_size=4)
    shuffled = random.Random(1).sample(rows, 200)
    other = FileData(lines(tmp_path / "b.jsonl", shuffled), tokenizer, holdout=0.2, batch_size=4)
    named = {rows[i]["text"] for i in data.held}
    assert named == {shuffled[i]["text"] for i in other.held} and 20 < len(named) < 60
    assert not set(data.held) & set(data.trained) and len(data.held) + len(data.trained) == 200
    shares = [[row for b in data.held_out(rank, 3) for row in b.rows] for rank in range(3)]
    assert sorted(sum(shares, [])) == sorted(i + 1 for i in data.held)
    trained = {row for step in taken(data, 60) for row in step}
    assert not trained & {i + 1 for i in data.held}
    few = FileData(tmp_path / "a.jsonl", tokenizer, holdout=0.2, holdout_rows=5, batch_size=4)
    assert len(few.held) == 5 and set(few.held) < set(data.held)
    assert set(few.trained) == set(data.trained)


# ------------------------------------------------------------------------------------ packed rows


def test_packed_rows_do_not_see_each_other(tmp_path, tokenizer):
    file = lines(tmp_path / "a.jsonl", texts(40))
    data = FileData(file, tokenizer, sequence_length=64, packed=True, batch_size=2)
    model = build("llama").eval()
    steps = list(itertools.islice(data.batches(0, 1, 0), 3))
    counts = [batch["input_ids"].shape for own in steps for batch in own]
    assert all(rows == 1 and tokens <= 64 for rows, tokens in counts)
    assert np.mean([tokens for _, tokens in counts]) > 40
    batch = steps[0][0]
    ids = batch["input_ids"] % 97  # the tiny model's vocabulary
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
    assert len(starts) > 2
    with torch.no_grad():
        packed = model(**batch | {"input_ids": ids, "labels": None}).logits
        for start, end in itertools.pairwise(starts):
            alone = model(input_ids=ids[:, start:end]).logits
            torch.testing.assert_close(packed[:, start:end], alone, rtol=0, atol=1e-5)
            assert batch["labels"][0, start] == -100


def test_packed_rows_have_no_pictures(tmp_path, processor):
    data = FileData(table(tmp_path), processor, packed=True, batch_size=1)
    with pytest.raises(CalibrationError, match="it has a picture, and packed rows are texts"):
        next(data.batches(0, 1, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": 1.0}, "holdout=1.0: a fraction below 1"),
        ({"holdout": -0.1}, "holdout=-0.1: a finite number of at least 0"),
        ({"seed": -1}, "seed=-1: a whole number of at least 0"),
        ({"batch_size": 0}, "batch_size=0: a whole number of at least 1"),
        ({"holdout": 1e-9}, "8 rows, and with holdout=1e-09 0 are held out"),
    ],
)
def test_bad_options(tmp_path, tokenizer, options, message):
    with pytest.raises(CalibrationError, match=message):
        FileData(lines(tmp_path / "a.jsonl", texts(8)), tokenizer, **options)


def test_too_few_rows_for_a_step(tmp_path, tokenizer):
    data = FileData(lines(tmp_path / "a.jsonl", texts(8)), tokenizer, batch_size=3)
    with pytest.raises(DataError, match="has 8 rows to train on, and 3 processes of 3 rows take 9"):
        next(data.batches(0, 3, 0))
