"""Teachers on disk: what is written, how an interrupted run goes on, what is refused."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from command import hipp
from models import batch as make_batch
from models import build, save_language_model
from transformers import AutoTokenizer

from hipp_ext.errors import (
    CalibrationError,
    CheckpointError,
    HippError,
    OutputBusyError,
    OutputExistsError,
    UnsupportedModelError,
)
from hipp_ext.files import content_hash
from hipp_ext.recover import CachedTeacher, Distillation, FileData, ModelTeacher, precompute
from hipp_ext.recover.cached_teacher import read_teacher
from hipp_ext.recover.places import find_places
from hipp_ext.recover.row_keys import row_keys
from hipp_ext.recover.teacher_files import bytes_per_position
from hipp_ext.runs import RunFolder

SETTINGS = {"top_k": 6, "shard_positions": 20}


def batches(name: str = "llama", count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Batches of two rows with answers of several tokens."""
    made = [make_batch(name, length=8, seed=seed, labels=True) for seed in range(count)]
    for batch in made:
        batch["labels"][0, :-5], batch["labels"][1, :-3] = -100, -100
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "teacher"
    precompute(build("llama"), batches(), folder, **SETTINGS)
    return folder


def test_a_student_learns_the_same_from_disk_whatever_the_batches(made):
    student, teacher = build("llama", seed=1), build("llama")
    rows = [{k: v[i : i + 1] for k, v in b.items()} for b in batches() for i in range(2)]
    random.Random(0).shuffle(rows)
    longer = {k: torch.cat([r[k] for r in rows[:5]]) for k in rows[0]}
    padded = {k: torch.nn.functional.pad(v, (3, 0)) for k, v in longer.items()}
    padded["labels"][:, :3] = -100
    for batch in (*rows[5:], longer, padded):
        for top_k in (None, 4):
            cached = Distillation(CachedTeacher(made), top_k=top_k).losses(student, batch)
            exact = Distillation(ModelTeacher(teacher), top_k=top_k or 6).losses(student, batch)
            torch.testing.assert_close(cached["kl"], exact["kl"], rtol=2e-3, atol=1e-4)
            found, expected = (
                torch.autograd.grad(loss["loss"], student.lm_head.weight)[0]
                for loss in (cached, exact)
            )
            torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.max()) / 200)


def test_a_student_in_bfloat16_learns_from_disk(made):
    student, batch = build("llama", seed=1), batches()[0]
    wide = Distillation(CachedTeacher(made)).losses(student, batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        narrow = Distillation(CachedTeacher(made)).losses(student, batch)["loss"]
    assert wide > 0 and float((narrow - wide).abs()) < 0.05 * float(wide)


def test_pictures_tell_rows_of_equal_tokens_apart(tmp_path):
    for name in ("llava", "qwen2_5_vl", "smolvlm", "llava_next"):
        batch = make_batch(name, size=3, labels=True)
        for key in ("input_ids", "labels"):
            batch[key] = batch[key][:1].expand(3, -1).contiguous()
        keys = row_keys(batch, find_places(batch, "answers", 5))
        assert len(set(keys)) == 3
        size = len(batch["pixel_values"]) // 3
        for row in range(3):
            alone = {k: v[row : row + 1] for k, v in batch.items()}
            alone["pixel_values"] = batch["pixel_values"][row * size : (row + 1) * size]
            assert row_keys(alone, find_places(alone, "answers", 5)) == [keys[row]]
            if name == "smolvlm":  # rows are filled up to equal numbers of pictures
                filled = torch.cat([batch["pixel_values"], torch.zeros(3, 2, 3, 32, 32)], 1)
                filled = batch | {"pixel_values": filled}
                assert row_keys(filled, find_places(filled, "answers", 5)) == keys
    batch["input_ids"][0, 1:3] = 11
    with pytest.raises(CalibrationError, match=r"belong to which of 3 rows.*batch_size=1"):
        row_keys(batch, find_places(batch, "answers", 5))
    teacher = precompute(build("llava"), batches("llava", 1), tmp_path, top_k=97)
    student = build("llava", seed=1)
    batch = batches("llava", 1)[0]
    exact = Distillation(ModelTeacher(build("llava"))).losses(student, batch)
    found = Distillation(teacher).losses(student, batch)
    torch.testing.assert_close(found["kl"], exact["kl"], rtol=2e-3, atol=1e-4)
    batch["pixel_values"][0, 0, 0, 0] += 1
    with pytest.raises(CheckpointError, match="Row 1 of a batch is not among the 2 rows"):
        Distillation(teacher).losses(student, batch)


def test_sizes_are_told_and_right(made, tmp_path):
    lines = []
    teacher = precompute(build("llama"), batches(), tmp_path, log=lines.append, **SETTINGS)
    assert len(lines) == 1 and "40 bytes per position, 8 positions in the first of 4" in lines[0]
    assert (teacher.header.rows, teacher.header.places, teacher.header.shards) == (8, 32, 2)
    assert bytes_per_position(6) == 40
    stored = [safetensors.torch.load_file(f) for f in sorted(tmp_path.glob("shard-*"))]
    assert [len(s["keys"]) for s in stored] == [6, 2]
    for name in ("indices", "log_p", "log_rest"):
        assert sum(len(s[name]) for s in stored) == 32
    each = sum(s[n].nbytes for s in stored for n in ("indices", "log_p", "log_rest")) / 32
    assert each == 40
    assert content_hash(tmp_path) == content_hash(made)


KILLED = """
    import sys, time; sys.path.insert(0, {tests!r})
    from itertools import islice
    import torch; torch.set_num_threads(1)
    from recover.test_precompute import SETTINGS, batches, build, precompute
    from hipp_ext.recover.precompute import BatchRows
    class Slow(BatchRows):
        def once(self, start):
            for made in islice(super().once(start), 6):
                print("step", flush=True)
                time.sleep(0.05)
                yield made
            time.sleep(600)  # it is killed before its end, however slow the machine is
    precompute(build("llama"), Slow(batches(count=12)), {folder!r}, **SETTINGS)
"""


def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    folder, rng = tmp_path / "cut", random.Random(0)
    script = textwrap.dedent(KILLED).format(
        tests=str(Path(__file__).parents[1]), folder=str(folder)
    )
    stages = list[int]()
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        for _ in range(rng.randint(4, 6)):  # a shard ends with its third step
            assert process.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        stages.append(len(list(folder.glob("shard-*"))))
    assert not (folder / "teacher.json").exists() and 0 < stages[0] < stages[1]
    with pytest.raises(CheckpointError, match=r"no complete teacher\.json.*again to complete it"):
        read_teacher(folder)
    for place in (folder, tmp_path / "whole"):
        precompute(build("llama"), batches(count=12), place, **SETTINGS)
    assert content_hash(folder) == content_hash(tmp_path / "whole")


def test_another_model_data_or_setting_is_not_mixed_in(made):
    before = content_hash(made)
    for model, data, options, message in (
        (build("llama", seed=1), batches(), {}, "model is .* there"),
        (build("llama"), batches(count=5), {}, r"data\.batches is"),
        (build("llama"), batches(), {"top_k": 5}, "top_k is 6 there, and 5 was asked for"),
        (build("llama"), batches(), {"temperature": 2}, "temperature is 1.0 there"),
        (build("llama"), batches(), {"positions": "text"}, "positions is answers there"),
    ):
        with pytest.raises(CheckpointError, match=f"holds another run: {message}"):
            precompute(model, data, made, **SETTINGS | options)
    identity = json.loads((made / "run.json").read_text())["identity"]
    with RunFolder(made, identity), pytest.raises(OutputBusyError, match="Another process works"):
        precompute(build("llama"), batches(), made, **SETTINGS)
    assert content_hash(made) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 2.0}, "temperature=2.0: .* was precomputed with temperature=1.0"),
        ({"positions": "text"}, "positions='text': .* was precomputed with positions='answers'"),
        ({"top_k": 7}, "top_k=7: .* keeps 6 tokens"),
        ({"hidden_share": 0.1}, "hidden_share=0.1: CachedTeacher keeps no hidden states"),
    ],
)
def test_settings_that_the_folder_does_not_have(made, options, message):
    with pytest.raises(HippError, match=message):
        Distillation(CachedTeacher(made), **options)


def test_a_student_with_another_vocabulary_is_refused(made):
    student = build("llama")
    student.resize_token_embeddings(104)
    with pytest.raises(CheckpointError, match="the teacher has 97 logits, the student 104"):
        Distillation(CachedTeacher(made)).losses(student, batches()[0])


def test_nothing_to_precompute_and_bad_options(tmp_path):
    model = build("llama")
    with pytest.raises(CalibrationError, match="The data has no rows"):
        precompute(model, [], tmp_path)
    with pytest.raises(HippError, match="top_k=0"):
        precompute(model, batches(), tmp_path, top_k=0)
    with pytest.raises(HippError, match="positions='all'"):
        precompute(model, batches(), tmp_path, positions="all")
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(UnsupportedModelError, match="gave NaN for the next token"):
        precompute(model, batches(), tmp_path)


def rewritten(folder: Path, change) -> None:
    """A shard with a right digest and other contents."""
    from hipp_ext.files.sealed import seal, unseal

    file = folder / "shard-000000.safetensors"
    tensors, about = unseal(file)
    change(tensors)
    file.write_bytes(seal(tensors, about))


def header(folder: Path, **changes) -> None:
    file = folder / "teacher.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "teacher.json").write_text("{"), "teacher.json is damaged"),
        (lambda d: header(d, top_k=7), "shard-000000.safetensors is damaged: shapes are"),
        (lambda d: header(d, shards=3), "shard-000002.safetensors is damaged: it is missing"),
        (lambda d: header(d, format=2), "teacher.json is damaged"),
        (lambda d: (d / "shard-000000.safetensors").write_bytes(b"x"), "shard-000000.* is damaged"),
        (lambda d: rewritten(d, lambda t: t["indices"].fill_(97)), "its values are no ids and"),
        (lambda d: rewritten(d, lambda t: t["indices"].fill_(-1)), "its values are no ids and"),
        (lambda d: rewritten(d, lambda t: t["log_p"].fill_(0.1)), "its values are no ids and"),
        (
            lambda d: rewritten(d, lambda t: t["log_rest"].fill_(torch.nan)),
            "its values are no ids and",
        ),
        (
            lambda d: rewritten(d, lambda t: t.update(log_p=t["log_p"].float())),
            "its values are no ids and",
        ),
        (lambda d: rewritten(d, lambda t: t["offsets"].mul_(-1)), "is damaged: shapes are"),
        (lambda d: rewritten(d, lambda t: t["offsets"][1:-1].add_(1)), "of 5 positions has others"),
        (lambda d: rewritten(d, lambda t: t.update(keys=t["keys"].int())), "keys are torch.int32"),
        (lambda d: rewritten(d, lambda t: t.pop("keys")), "shard-000000.safetensors is damaged"),
    ],
)
def test_damaged_folders(tmp_path, damage, message):
    precompute(build("llama"), batches(), tmp_path, **SETTINGS)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        Distillation(CachedTeacher(tmp_path)).losses(build("llama"), batches()[0])


def test_flipped_bits_are_noticed(tmp_path):
    precompute(build("llama"), batches(), tmp_path, **SETTINGS)
    file, rng = tmp_path / "shard-000000.safetensors", random.Random(0)
    whole, student = file.read_bytes(), build("llama", seed=1)
    expected = Distillation(CachedTeacher(tmp_path)).losses(student, batches()[0])["kl"]
    for _ in range(12):
        bit = rng.randrange(8 * len(whole))
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        try:
            found = Distillation(CachedTeacher(tmp_path)).losses(student, batches()[0])["kl"]
        except CheckpointError:
            continue
        assert found == expected, "a space of the header may be another one"


def test_a_damaged_shard_is_not_gone_on_from(tmp_path):
    precompute(build("llama"), batches(), tmp_path, **SETTINGS)
    (tmp_path / "teacher.json").unlink()
    (tmp_path / "shard-000001.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="Remove it to start again"):
        precompute(build("llama"), batches(), tmp_path, **SETTINGS)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny Llama with a tokenizer, and chats beside it."""
    return save_language_model(tmp_path_factory.mktemp("text"))


def test_the_command_writes_what_training_reads(place):
    given = (place / "llama", "--data", place / "chats.jsonl", "-o", place / "teacher")
    command = ("recover", "precompute", *given, "--top-k", "12", "--batch-size", "3")
    told = hipp(*command, "--device", "cpu")
    assert "12 tokens at each of" in told and "76 bytes per position" in told
    assert "1 rows of" in told and "were left out: row 9" in told and "of 8 rows" in told
    teacher = read_teacher(place / "teacher")
    assert isinstance(teacher, CachedTeacher) and teacher.vocabulary.tokens
    data = FileData(place / "chats.jsonl", AutoTokenizer.from_pretrained(place / "llama"))
    student = read_teacher(place / "llama").model
    for _, steps in zip(range(2), data.batches(0, 1, 0), strict=False):
        for batch in steps:
            found = Distillation(teacher).losses(student, batch)
            assert abs(float(found["kl"])) < 1e-3
    assert hipp(*command, "--device", "cpu").count("12 tokens") == 1  # complete: nothing is done
    with pytest.raises(OutputExistsError, match="llama exists"):  # or it would be taken for both
        hipp("recover", "precompute", *given[:-1], place / "llama")
    student = (place / "llama", "--teacher", place / "teacher", "--teacher-dtype", "bfloat16")
    other = place / "other.jsonl"
    turns = [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": "a cup"}]
    other.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(CheckpointError, match="Row 1 of the data is not among the 8 rows"):
        hipp("recover", *student[:3], "--data", other, "--batch-size", "1", "-o", place / "back")
    with pytest.raises(HippError, match="--teacher-dtype is for a dense model, and"):
        hipp("recover", *student, "--data", place / "chats.jsonl", "-o", place / "back")


def test_the_group_runs_training_without_its_name():
    shown = hipp("recover", "--help")
    assert "precompute" in shown and "--steps" in shown and "Usage: hipp recover" in shown
    assert "--steps" in hipp("recover", "train", "--help")
    assert "--top-k" in hipp("recover", "precompute", "--help")
    for arguments in (
        ("nowhere", "-o", "x"),
        ("-o", "x", "nowhere"),
        ("train", "nowhere", "-o", "x"),
    ):
        with pytest.raises(CheckpointError, match="nowhere is not a model folder"):
            hipp("recover", *arguments)
