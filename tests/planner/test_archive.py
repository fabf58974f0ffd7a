"""Archive, front, hypervolume, and what a preference is worth there."""

import hashlib
import math
import os
import resource

import pytest
import torch

from hipp_ext.errors import CheckpointError, WriteError
from hipp_ext.planner.archive import Archive, Record
from hipp_ext.planner.grpo import Learner
from hipp_ext.planner.policy import new_policy
from hipp_ext.planner.reward import DEFAULT_ENDS, Reward, scalarise


def archive_of(objectives) -> Archive:
    archive = Archive()
    archive.append(
        [
            Record(
                step=0,
                index=i,
                preference=(1, 0, 0),
                pruning_ratio=0.1,
                allocation=(0.0,),
                keep_counts=(i,),
                reward=Reward(utility=u, robustness=r, compression=c),
            )
            for i, (u, r, c) in enumerate(objectives)
        ]
    )
    return archive


def test_the_scalarisation_reaches_concave_parts_of_the_front():
    """A point that no linear weighting prefers to both ends."""
    front = torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.4, 0.0], [0.0, 1.0, 0.0]])
    even = torch.tensor([0.5, 0.5, 0.0]).expand(3, 3)
    assert int((even * front).sum(1).argmax()) != 1
    assert int(scalarise(front, even).argmax()) == 1


def test_weights_count_in_units_of_what_is_at_stake(signals):
    """Half of the weight on robustness brings it half way, though it falls by 0.06 in all and
    compression rises by 0.6.
    """
    learner, even = (
        Learner(new_policy(), signals, 1e-3),
        torch.tensor([0.0, 0.5, 0.5]).expand(7, 3),
    )
    ratios = torch.linspace(0, 0.6, 7)
    objectives = torch.stack([1 - ratios, 0.9 - 0.1 * ratios, ratios], 1)
    assert int(learner.value(objectives, even).argmax()) >= 5
    learner.ends = archive_of(objectives.tolist()).nadir_and_ideal()
    assert learner.ends.tolist() == [
        pytest.approx(row) for row in ([0.4, 0.84, 0.0], [1.0, 0.9, 0.6])
    ]
    assert int(learner.value(objectives, even).argmax()) == 3


def test_what_hardly_varies_is_left_on_its_whole_scale():
    assert torch.equal(Archive().nadir_and_ideal(), DEFAULT_ENDS)
    one_budget = archive_of([[0.9, 0.8, 0.3], [0.5, 0.7, 0.301], [0.6, 0.6, 0.302]])
    assert torch.equal(one_budget.nadir_and_ideal(), DEFAULT_ENDS)
    nadir, ideal = archive_of(
        [[0.9, 0.80, 0.1], [0.5, 0.84, 0.3], [0.7, 0.79, 0.5]]
    ).nadir_and_ideal()
    assert nadir.tolist() == pytest.approx([0.7, 0.79, 0]) and ideal.tolist() == pytest.approx(
        [0.9, 0.84, 0.5]
    )
    nadir, ideal = archive_of([[0.9, 0.80, 0.1], [0.7, 0.795, 0.5]]).nadir_and_ideal()
    assert nadir.tolist() == pytest.approx([0.7, 0, 0]) and ideal.tolist() == pytest.approx(
        [0.9, 1, 0.5]
    )


def test_hypervolume_and_front_of_a_small_archive():
    archive = archive_of([(1.0, 0.5, 0.1), (0.5, 1.0, 0.1), (0.4, 0.4, 0.05), (0.5, 0.5, 0.5)])
    assert {r.index for r in archive.front()} == {0, 1, 3}
    assert archive.hypervolume() == pytest.approx(0.5 * 0.5 * 0.5 + 2 * 0.5 * 0.5 * 0.1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("utility", 1e300),
        ("utility", math.inf),
        ("robustness", -math.inf),
        ("compression", math.nan),
        ("robustness_se", 2e6),
        ("utility_se", math.inf),
    ],
)
def test_rewards_that_no_plan_has_are_refused(field, value):
    """Infinity ends the process inside the hypervolume's library."""
    reward = {"utility": 0.5, "robustness": 0.5, "compression": 0.1} | {field: value}
    with pytest.raises(ValueError, match="no plan has such a reward"):
        Record(
            step=0,
            index=0,
            preference=(1, 0, 0),
            pruning_ratio=0.1,
            allocation=(0.0,),
            keep_counts=(1,),
            reward=Reward(**reward),
        )


LINES = {
    "infinity": ('"utility":1.0', '"utility":Infinity'),
    "a huge number": ('"utility":1.0', '"utility":1e999'),
    "no number": ('"utility":1.0', '"utility":NaN'),
    "a keep count below zero": ('"keep_counts":[1]', '"keep_counts":[-1]'),
    "a keep count without end": ('"keep_counts":[1]', '"keep_counts":[' + "9" * 5000 + "]"),
    "an allocation without end": ('"allocation":[0.0]', '"allocation":[Infinity]'),
    "nested lists": ('"keep_counts":[1]', '"keep_counts":' + "[" * 100_000 + "]" * 100_000),
    "another type": ('"step":0', '"step":[]'),
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_of_an_archive_that_says_what_cannot_be_is_refused(tmp_path, name):
    """Under a digest that is right, so that it is the values that are looked at."""
    text = (
        archive_of([(1.0, 0.5, 0.1)])
        .records[0]
        .model_copy(update={"keep_counts": (1,)})
        .model_dump_json()
    )
    assert LINES[name][0] in text
    changed = text.replace(*LINES[name])
    line = f'{changed[:-1]},"sha256":"{hashlib.sha256(changed.encode()).hexdigest()[:16]}"}}\n'
    (tmp_path / "archive.jsonl").write_text(line)
    with pytest.raises(CheckpointError, match="line 1, is not a record"):
        Archive(tmp_path / "archive.jsonl")


def test_an_archive_that_is_no_file_or_too_large_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    for name in ("pipe", "large"):
        with pytest.raises(CheckpointError, match="is no file, or has more than"):
            Archive(tmp_path / name)


def test_a_digit_that_changed_is_noticed(tmp_path):
    archive = Archive(tmp_path / "archive.jsonl")
    archive.append(archive_of([(1.0, 0.5, 0.1), (0.25, 1.0, 0.1)]).records)
    text = (tmp_path / "archive.jsonl").read_text()
    assert Archive(tmp_path / "archive.jsonl").records == archive.records
    (tmp_path / "archive.jsonl").write_text(text.replace('"utility":1.0', '"utility":0.0'))
    with pytest.raises(
        CheckpointError, match="line 1, is not a record: it is not as it was written"
    ):
        Archive(tmp_path / "archive.jsonl")


def test_a_full_disk_ends_in_one_line_and_keeps_what_was_written(tmp_path):
    path, records = (
        tmp_path / "archive.jsonl",
        archive_of([(1.0, 0.5, 0.1), (0.25, 1.0, 0.1)]).records,
    )
    archive = Archive(path)
    archive.append(records[:1])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 40, before[1]))
        with pytest.raises(
            WriteError, match=r"archive\.jsonl could not be written: .*\. What was finished is kept"
        ):
            archive.append(records[1:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Archive(path).records == records[:1]
