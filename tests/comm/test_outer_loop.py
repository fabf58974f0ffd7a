"""Local steps with an outer loop, on real gloo processes."""

import time

import pytest
import torch.multiprocessing as mp

from comm.outer_checks import recover_in_a_process
from comm.processes import run_checks

CHECKS = [
    "one_plain_local_step_is_an_averaged_gradient",
    "the_outer_loop_is_nesterov_on_the_mean_change",
    "compressed_changes_are_smaller_and_learn",
    "parameters_that_cannot_be_averaged",
    "recovering_by_local_steps",
]


@pytest.fixture(scope="module")
def pair():
    return run_checks(2, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(pair, name):
    assert not pair[name], pair[name]


def start(folder, store, pause=0.0):
    arguments = (folder, str(store), pause)
    return mp.start_processes(
        recover_in_a_process, arguments, nprocs=2, join=False, start_method="forkserver"
    ).processes


def end(processes):
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


def test_processes_that_were_killed_go_on_to_the_bit(pair, tmp_path):
    end(start(tmp_path / "whole", tmp_path / "store"))
    killed = start(tmp_path / "killed", tmp_path / "killed.store", pause=0.3)
    limit = time.monotonic() + 120
    while not (tmp_path / "killed/progress.safetensors").exists() and time.monotonic() < limit:
        time.sleep(0.02)
    for process in killed:
        process.kill()
        process.join()
    assert (tmp_path / "killed/step-4").exists() and not (tmp_path / "killed/step-7").exists()
    end(start(tmp_path / "killed", tmp_path / "again.store"))
    files = sorted(path.name for path in (tmp_path / "whole/step-7").iterdir())
    assert [name for name in files if name.startswith("optimizer")] == [
        "optimizer.rank0.safetensors",
        "optimizer.rank1.safetensors",
    ]
    for name in files:
        whole, again = (tmp_path / run / "step-7" / name for run in ("whole", "killed"))
        assert whole.read_bytes() == again.read_bytes(), name
