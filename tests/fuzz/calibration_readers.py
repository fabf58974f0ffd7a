"""Readers of the data that users calibrate on: tables, chats, texts, and folders of `datasets`."""

import functools
import json
from pathlib import Path
from typing import Any

from fuzz.readers import png
from fuzz.table import TABLE

TEXT = "Is there a cup in the image? "
# Rows of text behind those with pictures. Which rows are held out from training follows from their
# content: of this many, some are, and some are not.
TEXTS = tuple(f"{n} cups. {TEXT}" for n in range(6))


@functools.cache
def testbed() -> tuple[Any, Any]:
    """The testbed's model and processor."""
    from hipp_ext import testbed

    return testbed.load()


def pictures(folder: Path) -> None:
    (folder / "images").mkdir()
    for n, colour in enumerate(("red", "blue")):
        (folder / f"images/{n}.png").write_bytes(png(colour))


def openai(n: int) -> dict[str, Any]:
    import base64

    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}" if n else f"images/{n}.png"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": TEXT}]
    return {
        "messages": [
            {"role": "system", "content": "Yes or No"},
            {"role": "user", "content": content},
            {"role": "assistant", "content": "Yes"},
            {"role": "user", "content": [{"type": "text", "text": TEXT}]},
            {"role": "assistant", "content": [{"type": "text", "text": "No"}]},
        ]
    }


def make_chats(folder: Path) -> None:
    pictures(folder)
    rows = [openai(0), openai(1), *({"text": text} for text in TEXTS)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_llava(folder: Path) -> None:
    pictures(folder)
    turns = [{"from": "human", "value": f"<image>\n{TEXT}"}, {"from": "gpt", "value": "Yes"}]
    rows = [{"id": n, "image": f"images/{n}.png", "conversations": turns} for n in range(2)]
    rows += [{"conversations": [{"from": "human", "value": text}, turns[1]]} for text in TEXTS]
    (folder / "llava.json").write_text(json.dumps(rows))


def make_table(folder: Path) -> None:
    from vlm_tables import pope_rows, write_tsv

    write_tsv(folder / "table.tsv", pope_rows()[:8])


def make_text(folder: Path) -> None:
    (folder / "text.txt").write_text("".join(TEXTS) * 8)


def make_saved(folder: Path) -> None:
    from datasets import Dataset

    answers = openai(0)["messages"][2:3] * 2
    rows = [{"messages": [{"role": "user", "content": text}, *answers]} for text in TEXTS]
    Dataset.from_list(rows).save_to_disk(folder / "saved")


def fits(calibration: Any, folder: Path) -> None:
    """Every batch is one that the model takes, and what was left out is named."""
    from hipp_ext import Calibration

    Calibration.of(testbed()[0], calibration)
    assert all(
        batch["input_ids"].shape[1] <= 64 and batch["attention_mask"][:, -1].all()
        for batch in calibration.batches
    )
    assert all(", row " in line and len(line) < 5_000 for line in calibration.skipped)


def _reader(name: str, make: Any, share: float = 1.0) -> None:
    errors = ("CalibrationError", "DataError")

    @TABLE.reads(f"calibration-{name}", make, check=fits, errors=errors, share=share)
    def read(folder: Path) -> Any:
        from hipp_ext import Calibration

        files = {"chats": "chats.jsonl", "llava": "llava.json", "tsv": "table.tsv"}
        file = folder / files.get(name, {"txt": "text.txt"}.get(name, name))
        return Calibration.from_file(
            file, testbed()[1], image_folder=folder, rows=8, sequence_length=64, batch_size=2
        )


_reader("chats", make_chats)
_reader("llava", make_llava)
_reader("tsv", make_table)
_reader("txt", make_text)
_reader("saved", make_saved)


def trains(read: Any, folder: Path) -> None:
    """Batches have the rows that were not skipped, and every reason is short."""
    batches, skipped = read
    assert all(batch["labels"].shape == batch["input_ids"].shape for batch in batches)
    assert not {row for batch in batches for row in batch.rows} & set(skipped)
    assert all(len(reason) <= 300 for reason in skipped.values())


def _training_reader(name: str, make: Any, file: str) -> None:
    errors = ("CalibrationError", "DataError")

    @TABLE.reads(f"training-{name}", make, check=trains, errors=errors, share=0.5)
    def read(folder: Path) -> Any:
        from hipp_ext.recover import FileData

        data = FileData(
            folder / file,
            testbed()[1],
            image_folder=folder,
            sequence_length=64,
            batch_size=1,
            holdout=0.5,
        )
        rows = data.batches(0, 1, 0)
        batches = [batch for _ in range(2) for batch in next(rows)]
        return [*batches, *data.held_out(0, 1)], data.skipped


_training_reader("chats", make_chats, "chats.jsonl")
_training_reader("llava", make_llava, "llava.json")
_training_reader("tsv", make_table, "table.tsv")
_training_reader("txt", make_text, "text.txt")
_training_reader("saved", make_saved, "saved")
