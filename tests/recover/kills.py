"""Runs of `recover` that are killed with SIGKILL at random moments end as an undisturbed one does.

    PYTHONPATH=tests .venv/bin/python tests/recover/kills.py --workers 2 --kills 20
    PYTHONPATH=tests .venv/bin/python tests/recover/kills.py --workers 2 --local-steps 2

Every run is killed until it ends by itself, as often as the moment comes before the end.
"""

import argparse
import os
import random
import signal
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from hipp_ext.recover import FileData, RecoverSettings, recover
from recover.test_file_data import lines, texts
from recover.test_training import pruned, tokenizer

SETTINGS = RecoverSettings(
    steps=6, lr=1e-2, optimizer="adamw", evaluate_every=2, save_every=1, accumulation=2, rank=2
)


def worker(
    rank: int, workers: int, folder: Path, name: str, store: Path, settings: RecoverSettings
) -> None:
    """Recover in this process, and write the weights and what was returned."""
    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(store), workers), rank=rank, world_size=workers
        )
    model = pruned()
    data = FileData(folder / "rows.jsonl", tokenizer(), batch_size=2, holdout=0.2)
    result = recover(model, data, settings, folder=folder / name, progress=False)
    if rank == 0:
        found = (dict(model.named_parameters()), vars(result))
        torch.save(found, folder / f"{name}.part")
        os.replace(folder / f"{name}.part", folder / f"{name}.pt")


def start(
    workers: int, folder: Path, name: str, attempt: int, settings: RecoverSettings
) -> list[int]:
    """The numbers of the processes of a run."""
    numbers = []
    for rank in range(workers):
        if not (number := os.fork()):
            try:
                worker(rank, workers, folder, name, folder / f"{name}.store{attempt}", settings)
                os._exit(0)
            except BaseException:
                (folder / f"{name}.{rank}.log").write_text(traceback.format_exc())
                os._exit(1)
        numbers.append(number)
    return numbers


def ended(numbers: list[int], seconds: float) -> bool:
    """Whether the processes end within a time; they are killed otherwise, all at once."""
    limit = time.monotonic() + seconds
    left = set(numbers)
    while left and time.monotonic() < limit:
        left -= {n for n in left if os.waitpid(n, os.WNOHANG)[0]}
        time.sleep(0.002)
    for number in left:
        os.kill(number, signal.SIGKILL)
    for number in left:
        os.waitpid(number, 0)
    return not left


def same(folder: Path, one: str, other: str) -> bool:
    (weights, result), (others, resumed) = (
        torch.load(folder / f"{name}.pt", weights_only=False) for name in (one, other)
    )
    return result == resumed and all(torch.equal(weights[n], others[n]) for n in weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kills", type=int, default=20, help="Kills for each number of workers.")
    parser.add_argument("--local-steps", type=int, help="Steps that each process takes alone.")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    settings = replace(SETTINGS, local_steps=asked.local_steps, outer_momentum=0.5)
    rng = random.Random(asked.seed)
    for workers in asked.workers:
        folder = Path(tempfile.mkdtemp())
        lines(folder / "rows.jsonl", texts(60))
        begun = time.monotonic()
        undisturbed = start(workers, folder, "whole", 0, settings)
        assert ended(undisturbed, 300), "the undisturbed run does not end"
        whole, kills, runs = time.monotonic() - begun, 0, 0
        while kills < asked.kills:
            name, attempt = f"run{runs}", 0
            while not (folder / f"{name}.pt").exists():
                last = kills == asked.kills
                seconds = 300 if last else rng.uniform(0.1, 1) * whole
                numbers = start(workers, folder, name, attempt, settings)
                if not ended(numbers, seconds):
                    kills += 1
                attempt += 1
                assert attempt < 100, (folder / f"{name}.0.log").read_text()[-2000:]
            assert same(folder, "whole", name), f"{folder}: {name} differs after {attempt} attempts"
            runs += 1
        print(f"{workers} workers: {kills} kills in {runs} runs, all equal to the undisturbed one")


if __name__ == "__main__":
    main()
