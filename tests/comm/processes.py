"""Checks on real gloo processes; every rank calls each function, all in one set of processes."""

import datetime
import gc
import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hipp_ext.comm import (
    Compressor,
    LQSGDState,
    Options,
    load_state,
    lqsgd_hook,
    mean_gradients,
    register_lqsgd,
    save_state,
)
from hipp_ext.comm.exchange import run_together
from hipp_ext.errors import CompressionError

MORE = ("comm.hook_checks", "comm.recovery_checks")  # where more checks are
TIMEOUT = datetime.timedelta(seconds=60)
# Imported once, by the server that all processes are forked from.
PRELOADED = [
    "accelerate",
    "hipp_ext.comm.trainer",
    "hipp_ext.evals.studies.comm_baselines",
    "hipp_ext.recover",
    "hipp_ext.testbed.model",
    "torch.distributed.fsdp",
    "transformers.models.llava.modeling_llava",
    "transformers.trainer",
]


def run_checks(workers: int, names: list[str]) -> dict[str, str]:
    """Check -> what went wrong on any rank; empty where nothing did."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (workers, names, folder)
        multiprocessing.set_forkserver_preload(PRELOADED)
        context = mp.start_processes(
            _run, arguments, nprocs=workers, join=False, start_method="forkserver"
        )
        for process in context.processes:
            process.join(600)
        hanging = [process for process in context.processes if process.is_alive()]
        for process in hanging:
            process.kill()
            process.join()
        assert not hanging, f"{len(hanging)} of {workers} processes hang"
        results = {}
        for name in names:
            reports = [Path(folder, f"{name}.{rank}") for rank in range(workers)]
            results[name] = "\n".join(
                f"rank {r}: {f.read_text()}" if f.exists() else f"rank {r} never ended this check"
                for r, f in enumerate(reports)
                if not (f.exists() and not f.read_text()) and not (name == "a_rank_that_dies" and r)
            )
        return results


def _run(rank: int, workers: int, names: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # states without parameters search all objects for their DDP: not those of imports
    warnings.simplefilter("ignore", FutureWarning)
    # The environment serves accelerate, too.
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(workers),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
    )
    store = dist.FileStore(f"{folder}/store", workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers, timeout=TIMEOUT)
    for name in names:
        torch.manual_seed(0)
        try:
            modules = [importlib.import_module(module) for module in MORE]
            known = dict(item for module in modules for item in vars(module).items()) | globals()
            known[name](rank, workers, Path(folder))
            report = ""
        except BaseException:
            report = traceback.format_exc()
        Path(folder, f"{name}.{rank}").write_text(report)
    sys.stdout.flush()
    os._exit(0)


class Net(nn.Module):
    """Linear layers, a norm, a 0-dim parameter, and a branch that is used only where asked."""

    def __init__(self, width: int = 48, layers: int = 4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm, self.scale = nn.LayerNorm(width), nn.Parameter(torch.tensor(1.5))
        self.spare = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, spare: bool = True) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        x = self.norm(x) * self.scale
        return self.spare(x) if spare else x


def wrapped(rank: int, seed: int = 3, **kwargs) -> DistributedDataParallel:
    torch.manual_seed(seed)
    kwargs = {
        "bucket_cap_mb": 0.01
    } | kwargs  # many buckets: what torch's own hook does not survive on gloo
    return DistributedDataParallel(Net(), **kwargs)


def loss_of(model: nn.Module, rank: int, step: int = 0, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(8, 48, generator=generator).to(next(model.parameters()).dtype)
    return (model(x, **kwargs) - x.roll(1, 1)).square().mean().float()


def train(
    ddp: nn.Module, rank: int, steps: int, first: int = 0, rate: float = 0.5, **kwargs
) -> None:
    optimizer = torch.optim.SGD(ddp.parameters(), lr=rate)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(ddp, rank, step, **kwargs).backward()
        optimizer.step()


def gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, tensor.contiguous())
    return everyone


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().float().flatten() for t in tensors])


def assert_same_everywhere(tensors) -> None:
    everyone = gather(flat(tensors))
    assert all(torch.equal(t, everyone[0]) for t in everyone) and everyone[0].isfinite().all()


def ranks_are_equal_and_match_the_simulation(rank, workers, folder):
    for transport in ("all_gather", "all_to_all"):
        for bits in (8, 4):
            ddp = wrapped(rank)
            options = {"rank": 2, "bits": bits, "transport": transport}
            state, buckets = LQSGDState(ddp, timeout=TIMEOUT, **options), []
            ddp.register_comm_hook(
                state,
                lambda s, bucket, seen=buckets: (
                    seen.append(bucket.index()) or lqsgd_hook(s, bucket)
                ),
            )
            shapes = {n: p.shape for n, p in ddp.module.named_parameters()}
            twins = [
                Compressor(shapes, Options(**options), workers=workers, position=i)
                for i in range(workers)
            ]
            for step in range(4):
                gradients = []
                for other in range(workers):
                    named = list(ddp.module.named_parameters())
                    found = torch.autograd.grad(
                        loss_of(ddp.module, other, step), [p for _, p in named]
                    )
                    gradients.append({n: g for (n, _), g in zip(named, found, strict=True)})
                means, sent = run_together(
                    [t.step(g) for t, g in zip(twins, gradients, strict=True)]
                )
                train(ddp, rank, 1, step)
                for name, p in ddp.module.named_parameters():
                    assert torch.equal(p.grad, means[0][name]), (transport, bits, step, name)
                assert state.stats()["bytes_sent_last_step"] == sent > 0
            assert_same_everywhere(ddp.parameters())
            assert max(buckets) == 2  # three of them, from the second step on
            stats = state.stats()
            dense = round(
                2 * (workers - 1) / workers * 4 * sum(p.numel() for p in ddp.parameters())
            )
            assert (
                stats["dense_bytes_last_step"] == dense
                and stats["dense_bytes"] == 4 * dense
                and stats["steps"] == 4
            )
            assert stats["bytes_sent"] == 4 * sent < dense and stats["transport"] == transport


def default_arguments_learn(rank, workers, folder):
    ddp, plain = wrapped(rank, bucket_cap_mb=25), wrapped(rank, bucket_cap_mb=25)
    register_lqsgd(ddp, rank=4, bits=4)
    for model in (ddp, plain):
        train(model, rank, 40)
    assert_same_everywhere(ddp.parameters())
    before, after, reference = (loss_of(m.module, 9).item() for m in (wrapped(rank), ddp, plain))
    assert after < before - 0.7 * (before - reference), (before, after, reference)


def unused_parameters(rank, workers, folder):
    ddp = wrapped(rank, find_unused_parameters=True)
    state = register_lqsgd(ddp, rank=1, bits=8)
    train(ddp, rank, 3)
    residual = state.compressor.residual["spare.weight"].clone()
    for step in range(6):
        train(ddp, rank, 1, step, spare=False)
    assert torch.equal(state.compressor.residual["spare.weight"], residual) and residual.any()
    train(ddp, rank, 1, spare=rank == 0)  # used on one rank only
    assert_same_everywhere(ddp.parameters())


def all_zero_gradients(rank, workers, folder):
    ddp = wrapped(rank)
    register_lqsgd(ddp, rank=2)
    (loss_of(ddp, rank) * 0).backward()
    assert all((p.grad == 0).all() for p in ddp.parameters())
    train(ddp, rank, 2)
    assert_same_everywhere(ddp.parameters())


def half_precision_parameters(rank, workers, folder):
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        ddp = DistributedDataParallel(Net().to(dtype), bucket_cap_mb=0.02)
        state = register_lqsgd(ddp, rank=2)
        train(ddp, rank, 3, rate=0.05)
        assert_same_everywhere(ddp.parameters())
        assert all(m.dtype == torch.float32 for m in state.compressor.residual.values())
        dense = 2 * sum(p.numel() for p in ddp.parameters())
        assert state.stats()["dense_bytes_last_step"] == round(2 * (workers - 1) / workers * dense)


def sparse_gradients_are_refused(rank, workers, folder):
    torch.manual_seed(0)
    ddp = DistributedDataParallel(nn.Sequential(nn.Embedding(30, 8, sparse=True), nn.Linear(8, 8)))
    register_lqsgd(ddp)
    with pytest.raises(
        CompressionError, match=r"gradient of .*0\.weight.* is torch.sparse_coo.*sparse=False"
    ):
        ddp(torch.tensor([[1, 2]])).sum().backward()


def infinite_gradients(rank, workers, folder):
    ddp = wrapped(rank)
    state = register_lqsgd(ddp, rank=2, bits=8)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(6):
        bad = step == 2
        before = flat(ddp.parameters()).clone()
        residual = {n: m.clone() for n, m in state.compressor.residual.items()}
        optimizer.zero_grad()
        state.set_loss_scale(scaler.get_scale())
        scaled = {n: m.clone() for n, m in state.compressor.residual.items()}
        loss = scaler.scale(loss_of(ddp, rank, step)) * (
            torch.inf if bad and rank == workers - 1 else 1.0
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss.backward()
        assert any("not finite: all ranks get NaN" in str(w.message) for w in caught) == bad
        assert all(p.grad.isnan().all() == bad for p in ddp.parameters())
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(flat(ddp.parameters()), before) == bad
        assert all(torch.equal(m, scaled[n]) for n, m in state.compressor.residual.items()) == bad
        if step == 3:  # the scale was halved after the bad step, and the residual with it
            assert all(torch.equal(scaled[n], m / 2) for n, m in residual.items())
    assert state.stats()["skipped_steps"] == 1 and scaler.get_scale() == 512.0
    assert_same_everywhere(ddp.parameters())


def gradient_accumulation(rank, workers, folder):
    ddp = wrapped(rank)
    state = register_lqsgd(ddp, rank=2, bits=8)
    with ddp.no_sync():
        loss_of(ddp, rank, 0).backward()
    assert state.stats()["steps"] == 0
    local = {n: p.grad.clone() for n, p in ddp.module.named_parameters()}
    loss_of(ddp, rank, 1).backward()
    assert state.stats()["steps"] == 1
    assert_same_everywhere([p.grad for p in ddp.parameters()])
    assert not any(torch.equal(p.grad, local[n]) for n, p in ddp.module.named_parameters())
    sent_or_kept = sum((p.grad + 0).norm() for p in ddp.parameters())
    assert sent_or_kept > 0 and any(m.any() for m in state.compressor.residual.values())


def backward_broken_off(rank, workers, folder):
    """The queue is left half full; the next backward pass starts over."""
    ddp = wrapped(rank)
    state = register_lqsgd(ddp, rank=2)
    train(ddp, rank, 1)  # the first pass has one bucket, later ones have many
    hooked = ddp.module.layers[0].weight.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(ddp, rank, 0).backward()
    hooked.remove()
    assert len(state.queue) >= 2  # buckets of the broken pass
    ddp = DistributedDataParallel(ddp.module, bucket_cap_mb=0.02)  # as DDP asks for after an error
    ddp.register_comm_hook(state, lqsgd_hook)
    train(ddp, rank, 2)
    assert_same_everywhere(ddp.parameters())


def a_checkpoint_goes_on_to_the_bit(rank, workers, folder):
    whole = wrapped(rank)
    state = register_lqsgd(whole, rank=2, bits=4)
    train(whole, rank, 3)
    weights = {n: p.clone() for n, p in whole.module.state_dict().items()}
    file, plain = folder / f"state.{rank}.safetensors", folder / f"state.{rank}.pt"
    save_state(state, file)
    torch.save(state.state_dict(), plain)
    train(whole, rank, 3, first=3)
    for load in (
        lambda s: load_state(s, file),
        lambda s: s.load_state_dict(torch.load(plain, weights_only=True)),
    ):
        again = wrapped(rank)  # its first step has other buckets than `whole` had by now
        again.module.load_state_dict(weights)
        resumed = register_lqsgd(again, rank=2, bits=4)
        assert load(resumed) == []
        train(again, rank, 3, first=3)
        assert torch.equal(flat(again.parameters()), flat(whole.parameters()))
        assert resumed.stats() == state.stats()
    dist.barrier()
    with pytest.raises(CompressionError, match="each rank saves and loads its own residual"):
        load_state(resumed, folder / f"state.{(rank + 1) % workers}.safetensors")
    with pytest.raises(CompressionError, match="missing, damaged, or holds no LQ-SGD state"):
        load_state(resumed, folder / "nothing")
    Path(folder, f"cut.{rank}").write_bytes(file.read_bytes()[:100])
    with pytest.raises(CompressionError, match="missing, damaged, or holds no LQ-SGD state"):
        load_state(resumed, folder / f"cut.{rank}")
    with pytest.warns(UserWarning, match="goes on with"):
        dropped = resumed.load_state_dict(resumed.state_dict() | {"workers": workers + 1})
    assert len(dropped) == 1 and not any(m.any() for m in resumed.compressor.residual.values())


def ranks_that_differ_are_refused(rank, workers, folder):
    for options, message in (
        (
            {"bits": 8 if rank == 0 else 4},
            "do not compress alike: bits is 8 on rank 0, 4 on rank 1",
        ),
        ({"rank": 0 if rank == 1 else 2}, "Rank 1: rank=0: a whole number of at least 1"),
        ({"wings": 2}, "unexpected keyword argument 'wings'"),
    ):
        with pytest.raises(CompressionError, match=message):
            LQSGDState(nn.Linear(4, 4), **options)
    with pytest.raises(
        CompressionError, match=r"do not compress alike: shape of weight is \[5, 4\] on rank 0"
    ):
        LQSGDState(nn.Linear(4, 5 + rank))
    with pytest.raises(CompressionError, match="the parameters' order"):
        LQSGDState(dict(sorted(nn.Linear(4, 4).named_parameters(), reverse=rank == 0)))


def a_list_of_tensors(rank, workers, folder):
    torch.manual_seed(rank)
    tensors = [torch.randn(40, 30), torch.randn(7), torch.randn(())]
    mine = [t.clone() for t in tensors]
    state = LQSGDState(tensors, rank=3, bits=8)
    mean_gradients(mine, state)
    assert_same_everywhere(mine)
    mean = torch.stack(gather(flat(tensors))).mean(0)
    assert (flat(mine)[1200:] - mean[1200:]).abs().max() < 0.02 * mean.abs().max()
    with pytest.raises(CompressionError, match="2 gradients were given, the state was made for 3"):
        mean_gradients(mine[:2], state)
    for parameters, message in (
        ([], "0 parameters with 0 different names"),
        ([("a", tensors[0]), ("a", tensors[1])], "2 parameters with 1 different names"),
        ([torch.zeros(3, dtype=torch.complex64)], "0 is torch.complex64: only real"),
    ):
        with pytest.raises(CompressionError, match=message):
            LQSGDState(parameters)
    with pytest.raises(CompressionError, match="loss scale 0 is not"):
        state.set_loss_scale(0)
    with pytest.raises(
        CompressionError, match="DistributedDataParallel model is needed, this is Linear"
    ):
        register_lqsgd(nn.Linear(3, 3))


def another_model_than_the_wrapped_one(rank, workers, folder):
    ddp = wrapped(rank)
    ddp.register_comm_hook(LQSGDState(Net()), lqsgd_hook)
    with pytest.raises(CompressionError, match="that LQSGDState was not made with"):
        loss_of(ddp, rank).backward()


def fsdp_between_nodes(rank, workers, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from hipp_ext.comm import register_lqsgd_fsdp

    mesh = init_device_mesh("cpu", (workers, 1), mesh_dim_names=("nodes", "inside"))
    model, twin = _fresh_net(), DistributedDataParallel(_fresh_net())
    model.scale = nn.Parameter(torch.tensor([1.5]))  # FSDP2 takes no 0-dim parameters
    with pytest.raises(CompressionError, match="no module that fully_shard was applied to"):
        register_lqsgd_fsdp(model, mesh["nodes"].get_group())
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["inside"])
    fully_shard(model, mesh=mesh["inside"])
    states = register_lqsgd_fsdp(model, mesh["nodes"].get_group(), bits=8)
    assert set(states) == {"", *(f"layers.{i}" for i in range(4))}
    for m in (model, twin):
        train(m, rank, 4)
    assert_same_everywhere([p.to_local() for p in model.parameters()])
    sharded, plain = flat(p.to_local() for p in model.parameters()), flat(twin.module.parameters())
    start = flat(_fresh_net().parameters())
    assert (sharded - plain).norm() < 0.05 * (plain - start).norm() and not torch.equal(
        sharded, plain
    )
    sent = sum(s.stats()["bytes_sent"] for s in states.values())
    dense = sum(s.stats()["dense_bytes"] for s in states.values())
    assert 3.5 < dense / sent < 4.0


def _fresh_net() -> Net:
    torch.manual_seed(3)
    return Net()


def the_trainer_and_accelerate(rank, workers, folder):
    from accelerate import Accelerator
    from transformers import Trainer, TrainingArguments

    from hipp_ext.comm.trainer import LQSGDCallback

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _fresh_net()

        def forward(self, x):
            return {"loss": (self.net(x) - x.roll(1, 1)).square().mean()}

    data = [{"x": x} for x in torch.randn(64, 48, generator=torch.Generator().manual_seed(5))]

    def trainer(steps: int) -> tuple[Trainer, LQSGDCallback]:
        arguments = TrainingArguments(
            output_dir=str(folder / "out"),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=8,
            use_cpu=True,
            ddp_backend="gloo",
            report_to=[],
            logging_steps=1,
            disable_tqdm=True,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_only_model=True,
        )
        made = Trainer(model=Loss(), args=arguments, train_dataset=data)
        callback = LQSGDCallback(made, rank=2, bits=8)
        made.add_callback(callback)
        return made, callback

    first, callback = trainer(4)
    first.train()
    assert callback.state.stats()["steps"] == 4 and callback.state.stats()["bytes_sent"] > 0
    assert any("lqsgd_bytes_sent" in log for log in first.state.log_history)
    assert_same_everywhere(first.model.parameters())
    assert (folder / f"out/checkpoint-2/lqsgd.rank{rank}.safetensors").exists()
    again, callback = trainer(6)
    again.train(resume_from_checkpoint=True)
    assert callback.state.stats()["steps"] == 6
    ddp = Accelerator(cpu=True).prepare(_fresh_net())
    state = register_lqsgd(ddp, rank=2)
    train(ddp, rank, 2)
    assert state.stats()["steps"] == 2
    assert_same_everywhere(ddp.parameters())


def the_simulated_powersgd_trains_like_torchs(rank, workers, folder):
    """The study's baseline against torch's hook, which needs one bucket and two plain steps."""
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import (
        PowerSGDState,
        powerSGD_hook,
    )

    from hipp_ext.evals.studies.comm_baselines import powersgd

    def build():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 48))

    ddp, model = DistributedDataParallel(build(), bucket_cap_mb=100), build()
    state = PowerSGDState(
        None, matrix_approximation_rank=2, start_powerSGD_iter=2, orthogonalization_epsilon=1e-8
    )
    ddp.register_comm_hook(state, powerSGD_hook)
    train(ddp, rank, 60)
    named = dict(model.named_parameters())
    average = powersgd({n: p.shape for n, p in named.items()}, workers, 0, rank=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(60):
        found = [
            torch.autograd.grad(loss_of(model, other, step), list(named.values()))
            for other in range(workers)
        ]
        means, _ = average([dict(zip(named, f, strict=True)) for f in found])
        for n, p in named.items():
            p.grad = means[n]
        optimizer.step()
    start, real, simulated = (loss_of(m, 9).item() for m in (build(), ddp.module, model))
    assert abs(real - simulated) < 0.05 * (start - real), (start, real, simulated)


def recovering_goes_on_to_the_bit(rank, workers, folder):
    from hipp_ext.errors import CheckpointError
    from hipp_ext.recover import RecoverSettings, TestbedData, recover
    from hipp_ext.testbed.model import build_model, build_processor

    source = TestbedData(build_processor(), share=0.1)

    class CutOff:
        """Ends after four steps, as a run does that is interrupted."""

        def batches(self, rank, workers, start):
            for _, batch in zip(range(4), source.batches(rank, workers, start), strict=False):
                yield batch
            raise KeyboardInterrupt

    def run(name, data=source, **settings):
        model = build_model(0, hidden=32, ffn=48, layers=2, heads=4)
        settings = RecoverSettings(
            **({"steps": 5, "save_every": 3, "rank": 2, "bits": 4} | settings)
        )
        return model, recover(model, data, settings, folder=folder / name, progress=False)

    model, result = run("whole")
    assert_same_everywhere(model.parameters())
    assert (
        result.losses[-1] < result.losses[0]
        and 0 < result.stats["bytes_sent"] < result.stats["dense_bytes"] / 8
    )
    with pytest.raises(KeyboardInterrupt):
        run("cut", CutOff())
    again, resumed = run("cut")
    assert torch.equal(flat(again.parameters()), flat(model.parameters()))
    assert resumed == result
    plain, uncompressed = run("plain", compression="none", steps=2)
    assert uncompressed.stats is None
    assert_same_everywhere(plain.parameters())
    with pytest.raises(CheckpointError, match="bits is 4 there, and 8 was asked for"):
        run("whole", bits=8)


def a_rank_that_dies(rank, workers, folder):
    """The last check: the others get an error within the timeout."""
    ddp = wrapped(rank)
    register_lqsgd(ddp, timeout=datetime.timedelta(seconds=30))
    train(ddp, rank, 2)
    if rank:
        os._exit(1)
    with pytest.raises(CompressionError, match="a worker may have died"):
        train(ddp, rank, 3)
