"""`recover` in one process; several processes are in tests/comm."""

import hashlib
import itertools
import os
import random
from pathlib import Path

import pytest
import torch
from plans import random_plan

from hipp_ext import load_pruned, prune, save_pruned, testbed
from hipp_ext.cli.recover import _question_data
from hipp_ext.errors import CheckpointError, DataError, HippError
from hipp_ext.recover import QuestionData, RecoverSettings, TestbedData, recover
from hipp_ext.testbed.model import build_model, build_processor

SETTINGS = RecoverSettings(steps=6, save_every=2)


def pruned():
    model = build_model(0, hidden=32, ffn=48, layers=2, heads=4).eval()
    return prune(model, random_plan(model))


def source() -> TestbedData:
    return TestbedData(build_processor(), share=0.1)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    model = pruned()
    result = recover(
        model, source(), SETTINGS, folder=tmp_path_factory.mktemp("whole"), progress=False
    )
    return model, result


def test_the_loss_falls_and_the_plan_stays(whole, tmp_path):
    model, result = whole
    assert (
        len(result.losses) == 6
        and result.losses[-1] < result.losses[0] - 0.5
        and result.stats is None
    )
    assert not model.training and not torch.equal(weights(model), weights(pruned()))
    loaded = load_pruned(save_pruned(model, tmp_path / "a", build_processor()))
    assert loaded.hipp_plan == model.hipp_plan and torch.equal(weights(loaded), weights(model))


def replaced(path: Path, make) -> None:
    path.unlink()
    make(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: (d / "progress.safetensors").write_text("{"),
            "damaged: .*progress.safetensors is damaged",
        ),
        (
            lambda d: replaced(d / "progress.safetensors", Path.mkdir),
            "damaged: .*progress.safetensors is no file",
        ),
        (
            lambda d: replaced(d / "progress.safetensors", os.mkfifo),
            "damaged: .*progress.safetensors is no file",
        ),
        (
            lambda d: next(d.glob("step-*/weights.safetensors")).write_bytes(b"x"),
            "damaged: .*step-1.*start again",
        ),
        (
            lambda d: next(d.glob("step-*/optimizer.safetensors")).unlink(),
            "damaged: .*step-1.*start again",
        ),
        (lambda d: None, "holds another run: steps is 1 there, and 2 was asked for"),
    ],
)
def test_a_damaged_or_foreign_folder_says_so(tmp_path, damage, message):
    short = RecoverSettings(steps=1)
    recover(pruned(), source(), short, folder=tmp_path, progress=False)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        recover(
            pruned(),
            source(),
            RecoverSettings(steps=2) if "another run" in message else short,
            folder=tmp_path,
        )


def test_a_flipped_bit_is_not_gone_on_from(tmp_path):
    short, rng = RecoverSettings(steps=1), random.Random(0)
    model = pruned()
    recover(model, source(), short, folder=tmp_path, progress=False)
    for path in (
        tmp_path / "run.json",
        tmp_path / "progress.safetensors",
        *sorted(tmp_path.glob("step-1/*")),
    ):
        content = path.read_bytes()
        for _ in range(6):
            bit = rng.randrange(8 * len(content))
            path.write_bytes(
                content[: bit // 8]
                + bytes([content[bit // 8] ^ 1 << bit % 8])
                + content[bit // 8 + 1 :]
            )
            again = pruned()
            try:
                recover(again, source(), short, folder=tmp_path, progress=False)
            except CheckpointError:
                continue
            assert torch.equal(weights(again), weights(model)), (
                "a space of the header may be another one"
            )
        path.write_bytes(content)


def test_what_a_killed_run_left_in_the_folder_is_swept(tmp_path):
    model = pruned()
    recover(model, source(), RecoverSettings(steps=1), folder=tmp_path, progress=False)
    for name in ("step-0", "step-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".weights.safetensors.abc").write_bytes(b"half")
    recover(pruned(), source(), RecoverSettings(steps=1), folder=tmp_path, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "progress.safetensors",
        "recover.json",
        "recover.png",
        "run.json",
        "step-1",
    ]


def test_adamw_and_a_frozen_vision_tower(tmp_path):
    model, before = pruned(), dict(pruned().named_parameters())
    settings = RecoverSettings(steps=2, optimizer="adamw", freeze_vision=True)
    recover(model, source(), settings, folder=tmp_path, progress=False)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("vision" in name), name
    with pytest.raises(HippError, match="Linear has no parameters of a vision tower"):
        recover(torch.nn.Linear(2, 2), source(), settings, folder=tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    model = pruned()
    next(model.parameters()).data.fill_(torch.nan)
    with pytest.raises(HippError, match="loss of step 1 is nan: a smaller learning rate"):
        recover(model, source(), SETTINGS, folder=tmp_path, progress=False)
    # Nothing was saved: other settings may be tried in the same folder.
    other = RecoverSettings(steps=1, lr=1e-4)
    recover(pruned(), source(), other, folder=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match=r"another run: .*lr is 0\.0001 there"):
        recover(pruned(), source(), RecoverSettings(steps=1), folder=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0: a whole number of at least 1"),
        ({"optimizer": "sgd"}, "optimizer='sgd': one of muon, adamw"),
        ({"compression": "zip"}, "compression='zip': one of lqsgd, none"),
        ({"lr": -1.0}, "lr=-1.0: a finite number of at least 0"),
        ({"local_steps": 0}, "local_steps=0: a whole number of at least 1"),
        ({"outer_lr": 0}, "outer_lr=0: a finite number above 0"),
        ({"outer_momentum": 1}, "outer_momentum=1: a finite number of at least 0 and below 1"),
        ({"hidden_layers": (1,)}, r"hidden_layers=\(1,\): .* and a hidden_share above 0"),
        ({"hidden_layers": (-1,), "hidden_share": 0.5}, "hidden_layers=-1: a whole number of at"),
        ({"local_steps": 8, "sharding": "fsdp"}, "local_steps=8 needs the whole model in every"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(HippError, match=message):
        RecoverSettings(**settings)


def test_processes_share_an_epoch_of_questions_and_no_test_question_is_among_the_testbeds(tmp_path):
    processor = build_processor()
    asked = testbed.questions("POPE", "calibration", 16)
    made = QuestionData(processor, [asked], batch_size=2, seed=1)
    rows = [made.batches(rank, 2, 0) for rank in range(2)]
    epoch = torch.cat([next(r)[0]["input_ids"] for _ in range(4) for r in rows])
    whole = QuestionData(processor, [asked], batch_size=16).batches(0, 1, 0)
    assert sorted(map(str, epoch.tolist())) == sorted(
        map(str, next(whole)[0]["input_ids"].tolist())
    )
    assert next(itertools.islice(rows[0], 1))[0]["labels"].max() > 0
    with pytest.raises(
        DataError, match="A task has 16 questions, and 4 processes of 8 rows take 32"
    ):
        next(QuestionData(processor, [asked], batch_size=8).batches(0, 4, 0))


def test_resumed_batches_are_those_of_an_undisturbed_run():
    undisturbed = source().batches(1, 2, 0)
    third = list(itertools.islice(undisturbed, 3))[2]
    resumed = next(source().batches(1, 2, 2))
    other = next(source().batches(0, 2, 2))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(third, resumed, strict=True) for k in a)
    assert not all(
        a["input_ids"].shape == b["input_ids"].shape and torch.equal(a["input_ids"], b["input_ids"])
        for a, b in zip(third, other, strict=True)
    )


def test_tables_can_be_trained_on_and_published_test_sets_cannot(tmp_path, monkeypatch):
    from hipp_ext.evals import tables
    from hipp_ext.testbed import tsv

    tsv.export(tmp_path / "data")
    files = [
        tmp_path / "data/calibration/POPE.tsv",
        tmp_path / "data/calibration/ScienceQA_TEST.tsv",
    ]
    made = _question_data(build_processor(), files, 2, 0, tmp_path / "run", 0)
    model = pruned()
    result = recover(model, made, RecoverSettings(steps=2), folder=tmp_path / "run", progress=False)
    assert len(result.losses) == 2
    digest = hashlib.md5(files[0].read_bytes()).hexdigest()
    monkeypatch.setitem(tables._OFFICIAL, "POPE", ("", digest))
    with pytest.raises(DataError, match="is the published POPE, a test set"):
        _question_data(build_processor(), files[:1], 2, 0, tmp_path / "run2", 0)
