"""Calibration.from_file: every shape of the user's data gives the batches of `encode`."""

import base64
import io
import json
from pathlib import Path

import pytest
import torch
from models import build
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from hipp_ext import Calibration, testbed
from hipp_ext.calibration import encode, encode_text
from hipp_ext.calibration.batches import batches_digest
from hipp_ext.errors import CalibrationError, DataError
from hipp_ext.scorers import Taylor

STRINGS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + ' ' }}"
    "{% endfor %}ASSISTANT:"
)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(testbed.WEIGHTS)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(testbed.WEIGHTS)


@pytest.fixture(scope="module")
def asked():
    """Questions with and without pictures, of different lengths."""
    choices = [q for q in testbed.questions("ScienceQA", "calibration", 9) if q.scene is None]
    return [*testbed.questions("POPE", "calibration", 5), *choices]


@pytest.fixture(scope="module")
def pictures(asked, tmp_path_factory):
    """A folder with the pictures of the questions, named by their number."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "below").mkdir()
    for number, question in enumerate(asked):
        if question.scene is not None:
            question.image.save(folder / f"below/{number}.png")
    return folder


def png(question) -> bytes:
    question.image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def data_url(question) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(question)).decode()}"


def paths(asked) -> list[list[str]]:
    return [[f"below/{n}.png"] * (q.scene is not None) for n, q in enumerate(asked)]


def turns(question, *images) -> list[dict]:
    content = [*images, {"type": "text", "text": question.prompt}]
    answer = {"role": "assistant", "content": question.answer}
    return [{"role": "user", "content": content}, answer]


def lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return path


def openai_paths(asked, folder):
    rows = [
        {"messages": turns(q, *({"type": "image", "image": p} for p in own))}
        for q, own in zip(asked, paths(asked), strict=True)
    ]
    return lines(folder / "paths.jsonl", rows)


def openai_urls(asked, folder):
    def images(question):
        if question.scene is not None:
            yield {"type": "image_url", "image_url": {"url": data_url(question)}}

    return lines(folder / "urls.json", [{"messages": turns(q, *images(q))} for q in asked])


def llava(asked, folder):
    rows = []
    for question, own in zip(asked, paths(asked), strict=True):
        value = "<image>\n" * len(own) + question.prompt
        pair = [{"from": "human", "value": value}, {"from": "gpt", "value": question.answer}]
        rows.append({"id": len(rows), "conversations": pair} | ({"image": own[0]} if own else {}))
    (folder / "llava.json").write_text(json.dumps(rows))
    return folder / "llava.json"


def llava_without_marks(asked, folder):
    rows = json.loads(llava(asked, folder).read_text())
    for row in rows:
        row["conversations"][0]["value"] = row["conversations"][0]["value"].removeprefix(
            "<image>\n"
        )
    return lines(folder / "unmarked.jsonl", rows)


def saved_dataset(asked, folder):
    """As TRL's data sets are: pictures in a column of their own, stored as bytes."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageColumn

    text = {"type": Value("string"), "text": Value("string")}
    features = Features(
        messages=List({"role": Value("string"), "content": List(text)}), images=List(ImageColumn())
    )
    rows = []
    for question in asked:
        image = [{"type": "image", "text": None}] * (question.scene is not None)
        messages = turns(question, *image)
        messages[1]["content"] = [{"type": "text", "text": question.answer}]
        rows.append({"messages": messages, "images": [question.image] * len(image)})
    Dataset.from_list(rows, features=features).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


SHAPES = [openai_paths, openai_urls, llava, llava_without_marks, saved_dataset]


@pytest.mark.parametrize("write", SHAPES, ids=lambda write: write.__name__)
def test_every_shape_gives_the_batches_of_encode(write, asked, pictures, processor, tmp_path):
    path = write(asked, tmp_path)
    alone = Calibration.from_file(path, processor, image_folder=pictures, batch_size=1)
    expected = [
        encode(processor, [q.prompt], [q.image if q.scene else None], [q.answer]) for q in asked
    ]
    found = sorted(batches_digest([batch]) for batch in alone.batches)
    assert found == sorted(batches_digest([batch]) for batch in expected) and not alone.skipped
    together = Calibration.from_file(path, processor, image_folder=pictures)
    pope = next(batch for batch in together.batches if "pixel_values" in batch)
    whole = encode(
        processor, *zip(*[(q.prompt, q.image) for q in asked[:5]], strict=True), ["x"] * 5
    )
    assert together.rows == len(asked) and pope["pixel_values"].equal(whole["pixel_values"])


@pytest.mark.parametrize("task", ["POPE", "ScienceQA_TEST"])
def test_a_vlmevalkit_table_is_asked_as_vlmevalkit_asks(task, processor, tmp_path):
    testbed.export(tmp_path / "data", ["calibration"], n=7)
    path = tmp_path / f"data/calibration/{task}.tsv"
    calibration = Calibration.from_file(path, processor, batch_size=1)
    own = testbed.questions(task.partition("_")[0], "calibration", 7)
    expected = [encode(processor, [q.prompt], [q.image], [q.answer]) for q in own]
    found = sorted(batches_digest([batch]) for batch in calibration.batches)
    assert found == sorted(batches_digest([batch]) for batch in expected)


def test_a_table_may_name_files(asked, pictures, processor):
    rows = ["question\timage_path\tanswer", f"{asked[0].prompt}\t['below/0.png']\tYes"]
    (pictures / "table.tsv").write_text("\n".join([*rows, f"{asked[-1].question}\tNA\tNo"]))
    calibration = Calibration.from_file(pictures / "table.tsv", processor, batch_size=1)
    assert sorted("pixel_values" in batch for batch in calibration.batches) == [False, True]


@pytest.mark.parametrize("template", [None, STRINGS, "parts"])
def test_a_language_model_takes_its_tokenizer(template, asked, tokenizer, tmp_path):
    if template != "parts":
        tokenizer.chat_template = template
    asked = [q for q in asked if q.scene is None]
    rows = [{"messages": [{"role": "user", "content": q.prompt}, turns(q)[1]]} for q in asked]
    path = lines(tmp_path / "chats.jsonl", rows)
    calibration = Calibration.from_file(path, tokenizer, batch_size=1)
    expected = [encode_text(tokenizer, [q.prompt], [q.answer]) for q in asked]
    found = sorted(batches_digest([batch]) for batch in calibration.batches)
    assert found == sorted(batches_digest([batch]) for batch in expected)


LONG = [("system", "cup dog"), ("user", "Is there a cup"), ("assistant", "Yes"), ("user", "a dog")]


@pytest.mark.parametrize("template", [None, STRINGS])
def test_the_last_answer_is_the_label_and_what_comes_before_it_is_asked(
    template, tokenizer, tmp_path
):
    tokenizer.chat_template = template
    chat = [{"role": r, "content": c} for r, c in [*LONG, ("assistant", "No"), ("user", "cup")]]
    path = lines(tmp_path / "chat.jsonl", [{"messages": chat}])
    (batch,) = Calibration.from_file(path, tokenizer).batches
    labels, ids = batch["labels"][0], batch["input_ids"][0]
    assert tokenizer.decode(labels[labels != -100]).strip() == "No" and labels[-1] != -100
    shown = tokenizer.decode(ids, skip_special_tokens=True)
    assert shown.count("cup") == 2 and shown.index("Yes") < shown.index("a dog")


def test_a_long_chat_ends_at_its_last_answer_that_fits(processor, tmp_path, asked, pictures):
    image = {"type": "image", "image": "below/0.png"}
    chat = [{"role": "user", "content": [image, {"type": "text", "text": "Is there a cup"}]}]
    chat += [{"role": "assistant", "content": "Yes " * 9}]
    chat += [{"role": "user", "content": "dog " * 50}, {"role": "assistant", "content": "No"}]
    path = lines(tmp_path / "chat.jsonl", [{"messages": chat}])

    def read(length):
        calibration = Calibration.from_file(
            path, processor, image_folder=pictures, sequence_length=length
        )
        return calibration.batches[0]

    assert int((read(None)["labels"] != -100).sum()) == 1, "the whole chat ends with No"
    short = read(40)
    assert short["input_ids"].shape == short["labels"].shape == (1, 40)
    answer = short["labels"][short["labels"] != -100]
    assert set(processor.tokenizer.decode(answer).split()) == {"Yes"} and 0 < len(answer) < 9
    with pytest.raises(CalibrationError, match="row 1: its answer begins after 30 tokens"):
        read(30)
    with pytest.raises(CalibrationError, match="row 1: its pictures do not fit into 20 tokens"):
        read(20)


def test_rows_are_cut_on_the_right_and_padded_on_the_left(tokenizer, tmp_path):
    rows = [{"messages": turns_of("cup " * n, "Yes " * 9)} for n in (1, 6, 20)]
    path = lines(tmp_path / "chats.jsonl", rows)
    with pytest.warns(UserWarning, match="1 of 3 rows .* row 3: its answer begins after 12"):
        (batch,) = Calibration.from_file(path, tokenizer, sequence_length=12).batches
    assert batch["input_ids"].shape == (2, 12) and batch["attention_mask"].all()
    (batch,) = Calibration.from_file(path, tokenizer, sequence_length=17, rows=2).batches
    mask, ids = batch["attention_mask"].bool(), batch["input_ids"]
    whole = [encode_text(tokenizer, ["cup " * n], ["Yes " * 9])["input_ids"][0] for n in (1, 6)]
    for row, own, tokens in zip(mask, ids, whole, strict=True):
        assert own[row].equal(tokens[:17]) and row[-1] and row.diff().sum() <= 1
    assert (batch["labels"][~mask] == -100).all()


def turns_of(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def user(*content) -> dict:
    return {"messages": [{"role": "user", "content": list(content)}]}


def image(value) -> dict:
    return user({"type": "image_url", "image_url": {"url": value}}, {"type": "text", "text": "cup"})


def marked(value, **row) -> dict:
    return {"conversations": [{"from": "human", "value": value}], **row}


NOT_A_PICTURE = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0").decode()
SKIPPED = {
    "text": ("not JSON", "it is not valid JSON"),
    "number": (3, "it is of type int, and an object is needed"),
    "shape": (
        {"prompt": "cup"},
        "it has none of messages, conversations, question, text, only prompt",
    ),
    "turns": ({"messages": "cup"}, "its turns are no list of objects"),
    "role": ({"messages": [{"role": "robot"}]}, "it has a turn of robot; known are system"),
    "content": ({"messages": [{"role": "user"}]}, "neither a text nor a list of parts"),
    "part": (user({"type": "video"}), "it has a part of the type video"),
    "value": (marked(None), "it has a turn whose value is no text"),
    "nobody": ({"messages": []}, "it has no turn of the user"),
    "address": (image("https://example.org/a.png"), "nothing is fetched: download it"),
    "file address": (image("file:///etc/passwd"), "is at file:///etc/passwd, and nothing is"),
    "elsewhere": (image("../secret.png"), "picture ../secret.png is not below the image folder"),
    "root": (image("/etc/passwd"), "is not below the image folder"),
    "gone": (image("gone.png"), "gone.png cannot be read: No such file"),
    "link": (image("link.png"), "picture link.png is not below the image folder"),
    "base64": (image("data:image/png;base64,?"), "its picture is no base64 text"),
    "EPS": (image(f"data:image/png;base64,{NOT_A_PICTURE}"), "it is no picture of a kind"),
    "none": (user({"type": "image"}), "it has an image part without an image"),
    "unused": (
        user({"type": "text", "text": "a"}) | {"images": ["a.png"]},
        "more pictures than image",
    ),
    "marks": (
        marked("<image> or <image>?", image="a.png"),
        "it has 2 <image> marks and 1 pictures",
    ),
    "token": (user({"type": "text", "text": "a <image> b"}), "token that stands for pictures"),
    "empty text": ({"text": " "}, "its text is empty"),
    "half a character": ({"text": "cup \ud800"}, "its text holds half a character"),
    "one token": ({"text": "<image>"}, "its text has fewer than two tokens"),
    "token in a text": ({"text": "a <image> b"}, "its text holds the token that stands for"),
    "much text": (
        {"text": "a", "messages": [user("x")["messages"][0] | {"content": "a " * 2**20}]},
        "more than 1,048,576 characters",
    ),
    "many pictures": (
        marked("<image>" * 65, image=["a.png"] * 65),
        "it has 65 pictures; 64 are read",
    ),
}


def test_rows_that_do_not_fit_are_counted_and_named(processor, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (tmp_path / "images/link.png").symlink_to(tmp_path / "secret.png")
    path = lines(tmp_path / "rows.jsonl", [marked("cup"), *(row for row, _ in SKIPPED.values())])
    path.write_text(path.read_text().replace('"not JSON"', "not JSON"))
    first = (
        f"{len(SKIPPED)} of {len(SKIPPED) + 1} rows of .*: row 2: it is not valid JSON.*; row 3: "
    )
    with pytest.warns(UserWarning, match=f"{first}.*; and {len(SKIPPED) - 3} more"):
        calibration = Calibration.from_file(path, processor, image_folder=tmp_path / "images")
    assert calibration.rows == 1 and "labels" not in calibration.batches[0]
    assert len(calibration.skipped) == len(SKIPPED)
    for number, (line, (_, reason)) in enumerate(
        zip(calibration.skipped, SKIPPED.values(), strict=True), 2
    ):
        assert line.startswith(f"{path}, row {number}: ") and reason in line


def test_a_chat_of_many_answers_is_read_in_few_attempts(tokenizer, tmp_path, monkeypatch):
    from hipp_ext.calibration import fitting

    attempts = []
    encode = fitting.encode_rendered
    monkeypatch.setattr(fitting, "encode_rendered", lambda *a: attempts.append(1) or encode(*a))
    row = {"messages": [*turns_of("cup", "Yes"), *turns_of("dog", "No")] * 50}
    path = lines(tmp_path / "a.jsonl", [row])
    (batch,) = Calibration.from_file(path, tokenizer, sequence_length=40).batches
    labels = batch["labels"][0]
    assert len(attempts) <= 9 and batch["input_ids"].shape[1] > 30
    assert tokenizer.decode(labels[labels != -100]).strip() in ("Yes", "No")


def test_pictures_of_a_row_have_a_limit_together(asked, pictures, processor, tmp_path, monkeypatch):
    monkeypatch.setattr("hipp_ext.calibration.fitting.PICTURE_PIXELS", 2000)
    two = marked("cup", image=["below/0.png", "below/1.png"])
    path = lines(tmp_path / "a.jsonl", [two, marked("cup", image="below/0.png")])
    with pytest.warns(UserWarning, match="row 1: its pictures have more than 2,000 pixels in all"):
        calibration = Calibration.from_file(path, processor, image_folder=pictures)
    assert calibration.rows == 1


def test_pictures_need_a_model_that_takes_them(asked, pictures, tokenizer, tmp_path):
    path = openai_paths(asked[:1], tmp_path)
    with pytest.raises(
        CalibrationError, match="None of the 1 rows of .*it has a picture, and .* takes none"
    ):
        Calibration.from_file(path, tokenizer, image_folder=pictures)
    with pytest.raises(CalibrationError, match="No processor was given"):
        Calibration.from_file(path, None)


def test_rows_are_evenly_spaced_and_alike_in_a_batch(tokenizer, tmp_path):
    path = lines(tmp_path / "t.jsonl", [{"text": "cup " * (40 - n)} for n in range(40)])
    calibration = Calibration.from_file(path, tokenizer, rows=8, batch_size=3)
    lengths = [batch["attention_mask"].sum(1).tolist() for batch in calibration.batches]
    assert lengths == [[5, 10, 15], [20, 25, 30], [35, 40]]
    again = Calibration.from_file(path, tokenizer, rows=8, batch_size=3)
    assert again.digest == calibration.digest


@pytest.mark.parametrize("repeats", [30, 20_000])
def test_a_text_is_taken_in_chunks(repeats, tokenizer, tmp_path):
    words = "Is there a cup in the image ?"
    (tmp_path / "a.txt").write_text(" ".join([words] * repeats))
    calibration = Calibration.from_file(tmp_path / "a.txt", tokenizer, rows=10, sequence_length=16)
    ids = torch.cat([batch["input_ids"] for batch in calibration.batches])
    assert ids.shape == (10, 16) and calibration.rows == 10
    expected = set(tokenizer(words)["input_ids"])
    assert set(ids.unique().tolist()) == expected
    labels = torch.cat([batch["labels"] for batch in calibration.batches])
    assert (labels[:, 0] == -100).all() and labels[:, 1:].equal(ids[:, 1:])
    (tmp_path / "b.txt").write_text("Is there")
    assert Calibration.from_file(tmp_path / "b.txt", tokenizer).batches[0]["input_ids"].shape == (
        1,
        2,
    )


def test_texts_begin_as_the_tokenizer_begins_them(tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    (tmp_path / "a.txt").write_text("cup dog " * 20)
    lines(tmp_path / "a.jsonl", [{"text": "cup dog " * 20}])
    for name in ("a.txt", "a.jsonl"):
        calibration = Calibration.from_file(tmp_path / name, tokenizer, sequence_length=9)
        for ids in calibration.batches[0]["input_ids"]:
            assert ids[0] == tokenizer.bos_token_id and len(ids) == 9
            assert (ids[1:] != tokenizer.bos_token_id).all()


def test_each_task_may_have_its_file(tokenizer, tmp_path):
    one = lines(tmp_path / "one.jsonl", [{"text": "cup dog"}])
    other = lines(tmp_path / "other.jsonl", [{"text": "dog cup"}, {"text": ""}])
    with pytest.warns(UserWarning, match="1 of 2 rows of .*other.jsonl were left out"):
        calibration = Calibration.from_file({"utility": one, "robustness": other}, tokenizer)
    words = [calibration.by_task[task][0]["input_ids"][0] for task in ("utility", "robustness")]
    assert [tokenizer.decode(ids) for ids in words] == ["cup dog", "dog cup"]
    assert calibration.skipped == (f"{other}, row 2: its text is empty, or no text",)
    with pytest.raises(CalibrationError, match="files for utility and robustness; got"):
        Calibration.from_file({"utility": one}, tokenizer)


def test_texts_and_chats_serve_losses_and_scores(tokenizer, tmp_path):
    chats = [{"messages": turns_of("cup", "Yes")}, {"text": "cup dog cup dog"}]
    calibration = Calibration.from_file(lines(tmp_path / "a.jsonl", chats), tokenizer)
    model = build("llama")
    model.resize_token_embeddings(len(tokenizer))
    assert all(float(s.sum()) > 0 for s in Taylor()(model, calibration).values())


def broken(folder, name, content=b"") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


FILES = {
    "kind": ("a.csv", b"", CalibrationError, "is of no kind that is read. Give a VLMEvalKit table"),
    "folder": ("a/b.json", b"", CalibrationError, "is no folder that `datasets` saved"),
    "splits": ("a/dataset_dict.json", b"", CalibrationError, "holds several splits"),
    "shards": ("a/state.json", b"{}", DataError, "names no data files"),
    "outside": (
        "a/state.json",
        b'{"_data_files": [{"filename": "../x"}]}',
        DataError,
        "is no file of",
    ),
    "arrow": (
        "a/state.json",
        b'{"_data_files": [{"filename": "state.json"}]}',
        DataError,
        "as Arrow",
    ),
    "no chats": ("a.jsonl", b"\n", CalibrationError, "None of the 0 rows"),
    "JSON": ("a.json", b"{", DataError, "is not valid JSON"),
    "deep JSON": ("a.json", b"[" * 100_000, DataError, "nested too deeply"),
    "deep lines": ("a.jsonl", b"[" * 100_000, CalibrationError, "nested too deeply"),
    "no table": ("a.tsv", b"a\tb\n", DataError, "has the column question; this one has a, b"),
    "no header": ("a.tsv", b"", DataError, "this one has no header"),
    "table not UTF-8": ("a.tsv", b"question\n\xff\n", DataError, "cannot be read as a table"),
    "text not UTF-8": ("a.txt", b"\xff", DataError, "is not UTF-8 text"),
    "no text": ("a.txt", b"", CalibrationError, "its text has fewer than two tokens"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read_say_why(name, tokenizer, tmp_path):
    file, content, error, message = FILES[name]
    path = broken(tmp_path, file, content)
    with pytest.raises(error, match=message):
        Calibration.from_file(path if path.parent == tmp_path else path.parent, tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows=0: a whole number of at least 1"),
        ({"sequence_length": 1}, "sequence_length=1: a whole number of at least 2"),
        ({"batch_size": 1.5}, "batch_size=1.5: a whole number of at least 1"),
    ],
)
def test_numbers_are_whole(options, message, tokenizer, tmp_path):
    with pytest.raises(CalibrationError, match=message):
        Calibration.from_file(tmp_path / "a.txt", tokenizer, **options)


def test_the_options_of_the_commands(tokenizer, tmp_path):
    from hipp_ext.cli.options import read_calibration

    path = lines(tmp_path / "a.jsonl", [{"text": "cup dog"}, {"text": ""}])
    for none in (None, []):
        assert read_calibration(none, None, None, None)(None, tokenizer) is None
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        assert read_calibration([str(path)], None, 2, None)(None, tokenizer).rows == 1
    names = [f"utility={path}", f"robustness={path}"]
    by_task = read_calibration(names, None, 1, None)(None, tokenizer)
    assert by_task.by_task["utility"] is by_task.by_task["robustness"]
    for files in ([f"utility={path}"], [str(path)] * 2, [f"utility={path}", str(path)]):
        with pytest.raises(CalibrationError, match="Give --calibration once, or twice as"):
            read_calibration(files, None, None, None)
    with pytest.raises(CalibrationError, match="--image-folder and --sequence-length describe"):
        read_calibration(None, None, None, 9)
