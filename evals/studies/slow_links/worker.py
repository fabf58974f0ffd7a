"""One of the two processes that recover a model; the first prints what came out, as JSON."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hipp_ext.calibration import Batch
from hipp_ext.evals.studies.slow_links.tasks import TASKS
from hipp_ext.recover import DataSource, RecoverSettings, recover
from hipp_ext.recover.processes import join_processes


class Timed:
    """A data source that notes when each step begins."""

    def __init__(self, source: DataSource):
        self.source, self.begins = source, list[float]()

    def batches(self, rank: int, workers: int, start: int) -> Iterator[list[Batch]]:
        self.begins.clear()
        for batches in self.source.batches(rank, workers, start):
            self.begins.append(time.perf_counter())
            yield batches


def main(job: dict[str, Any]) -> None:
    """Recover, and print the result.

    Args:
        job: task, pruned (folder of the model), folder (for checkpoints), seed, evaluate (whether
            the held-out rows are evaluated), settings (those of the method; None: no training).
    """
    torch.set_num_threads(1)
    rank, _ = join_processes()
    task = TASKS[job["task"]]
    loaded = task.load(Path(job["pruned"]))
    row: dict[str, Any] = {}
    if job["settings"] is not None:
        data = Timed(loaded.data(job["seed"]))
        shared = {"save_every": 10**6, "seed": job["seed"], **task.settings}
        settings = RecoverSettings(**shared | job["settings"])
        result = recover(loaded.model, data, settings, folder=job["folder"], progress=False)
        row = {"losses": result.losses, "stats": result.stats, "begins": data.begins}
    if rank == 0:
        loss = loaded.held_out_loss() if job["evaluate"] else None
        print(json.dumps(row | {"loss": loss}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
