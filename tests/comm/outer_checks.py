"""Checks of local steps on real gloo processes, run by `comm.processes`."""

import copy
import os
import time

import pytest
import torch
import torch.distributed as dist

from comm.processes import Net, assert_same_everywhere, flat, loss_of
from hipp_ext.comm import LQSGDState, OuterLoop
from hipp_ext.errors import CompressionError


def net() -> Net:
    torch.manual_seed(3)
    return Net()


def train_alone(model, rank, steps, first=0, lr=0.5):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()


def one_plain_local_step_is_an_averaged_gradient(rank, workers, folder):
    model, ddp = net(), torch.nn.parallel.DistributedDataParallel(net())
    outer = OuterLoop(model, lr=1.0, momentum=0.0)
    outer.begin()
    for step in range(3):
        train_alone(model, rank, 1, step)
        train_alone(ddp, rank, 1, step)
        outer.exchange()
    assert_same_everywhere(model.parameters())
    start, mine, theirs = (flat(m.parameters()) for m in (net(), model, ddp))
    assert (mine - theirs).norm() < 1e-6 * (theirs - start).norm()
    copy_bytes = sum(4 * p.numel() for p in model.parameters())
    sent = 3 * round(2 * (workers - 1) / workers * copy_bytes)
    assert outer.stats() == {
        "exchanges": 3,
        "bytes_sent": sent,
        "dense_bytes": sent,
        "workers": workers,
    }


def the_outer_loop_is_nesterov_on_the_mean_change(rank, workers, folder):
    """Algorithm 1 of DiLoCo written down a second time, with all workers in this process."""
    model = net()
    outer = OuterLoop(model, lr=0.7, momentum=0.9)
    outer.begin()
    common, velocity = flat(model.parameters()), 0.0
    for turn in range(3):
        alone = []
        for worker in range(workers):
            own = copy.deepcopy(model)
            train_alone(own, worker, 4, 4 * turn)
            alone.append(common - flat(own.parameters()))
        change = torch.stack(alone).mean(0)
        velocity = 0.9 * velocity + change
        common = common - 0.7 * (change + 0.9 * velocity)
        train_alone(model, rank, 4, 4 * turn)
        assert not torch.allclose(flat(model.parameters()), common, atol=1e-4)
        outer.exchange()
        assert torch.allclose(flat(model.parameters()), common, atol=1e-5)
    assert_same_everywhere(model.parameters())


def compressed_changes_are_smaller_and_learn(rank, workers, folder):
    model = net()
    state = LQSGDState(model, rank=4, bits=8)
    outer = OuterLoop(model, compression=state)
    outer.begin()
    before = loss_of(model, 0, 99).item()
    for turn in range(6):
        train_alone(model, rank, 4, 4 * turn)
        outer.exchange()
    stats = outer.stats()
    assert stats["exchanges"] == state.stats()["steps"] == 6
    assert 0 < stats["bytes_sent"] < stats["dense_bytes"] / 4
    assert loss_of(model, 0, 99).item() < 0.9 * before
    assert_same_everywhere(model.parameters())


def parameters_that_cannot_be_averaged(rank, workers, folder):
    model = net()
    outer = OuterLoop(model)
    if rank == 1:
        with torch.no_grad():
            model.scale.add_(1)
    with pytest.raises(CompressionError, match="rank 1 has other parameters than rank 0"):
        outer.begin()
    model = net()
    outer = OuterLoop(model)
    outer.begin()
    if rank == 0:
        with torch.no_grad():
            model.scale.fill_(torch.inf)
    with pytest.raises(CompressionError, match="not finite in exchange 1: a smaller learning rate"):
        outer.exchange()
    for options, message in (
        ({"lr": 0}, "lr=0: a finite number above 0"),
        ({"momentum": 1.0}, "momentum=1.0: a finite number of at least 0 and below 1"),
    ):
        with pytest.raises(CompressionError, match=message):
            OuterLoop(model, **options)


class Slowly:
    """The testbed's questions, with a pause before each step, and an end."""

    def __init__(self, pause=0.0, end=10**9):
        from hipp_ext.recover import TestbedData
        from hipp_ext.testbed.model import build_processor

        self.source, self.pause, self.end = TestbedData(build_processor(), share=0.1), pause, end

    def batches(self, rank, workers, start):
        for _, batch in zip(
            range(self.end), self.source.batches(rank, workers, start), strict=False
        ):
            time.sleep(self.pause)
            yield batch
        raise KeyboardInterrupt


def recovered(folder, data=None, **settings):
    """(model, result) of a tiny run, whose checkpoints are after steps 4 and 7."""
    from hipp_ext.recover import RecoverSettings, recover
    from hipp_ext.testbed.model import build_model

    model = build_model(0, hidden=32, ffn=48, layers=2, heads=4)
    chosen = RecoverSettings(
        **{"steps": 7, "save_every": 3, "local_steps": 2, "outer_momentum": 0.5, **settings}
    )
    return model, recover(model, data or Slowly(), chosen, folder=folder, progress=False)


def recovering_by_local_steps(rank, workers, folder):
    """Interrupted or not, compressed or not: it ends with the same weights on every process."""
    for compression, least in (("none", 1), ("lqsgd", 8)):
        model, result = recovered(folder / f"whole-{compression}", compression=compression)
        assert_same_everywhere(model.parameters())
        assert result.losses[-1] < result.losses[0]
        stats = result.stats
        assert stats["exchanges"] == 4  # after steps 2, 4, 6, and after the last one
        assert 0 < stats["bytes_sent"] <= stats["dense_bytes"] / least
        cut = folder / f"cut-{compression}"
        with pytest.raises(KeyboardInterrupt):
            recovered(cut, Slowly(end=6), compression=compression)
        dist.barrier()
        assert (cut / "step-4" / f"optimizer.rank{rank}.safetensors").exists()
        again, resumed = recovered(cut, compression=compression)
        assert torch.equal(flat(again.parameters()), flat(model.parameters()))
        assert resumed == result


def recover_in_a_process(rank, folder, store, pause):
    """Target of a process that is killed, or ends."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    recovered(folder, Slowly(pause))
    os._exit(0)
