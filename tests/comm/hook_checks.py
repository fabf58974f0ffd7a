"""More checks on real gloo processes, run by `comm.processes`: use under DDP, and resuming."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from models import batch as make_batch
from models import build
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from comm.processes import Net, assert_same_everywhere, flat, gather, loss_of, train, wrapped
from hipp_ext.comm import (
    LQSGDState,
    load_checkpoint,
    load_state,
    lqsgd_hook,
    mean_gradients,
    register_lqsgd,
    save_checkpoint,
    save_state,
)
from hipp_ext.errors import CompressionError
from hipp_ext.recover import Distillation, ModelTeacher

WHOLE = {
    "min_compression_rate": 1e9
}  # nothing as factors: what is handed out is the mean, but for the quantiser


def gradients(ddp: nn.Module) -> torch.Tensor:
    return flat(p.grad for p in ddp.parameters() if p.grad is not None)


def hooked(state: LQSGDState, rank: int, **kwargs) -> DistributedDataParallel:
    ddp = wrapped(rank, **kwargs)
    ddp.register_comm_hook(state, lqsgd_hook)
    return ddp


def made_like_powersgd(rank, workers, folder):
    """Without parameters at first, the state hands out to the bit what one made with them does."""
    for transport in ("all_gather", "all_to_all"):
        one = wrapped(rank)
        named = register_lqsgd(one, rank=2, bits=4, transport=transport, seed=5)
        state = LQSGDState(
            None, matrix_approximation_rank=2, bits=4, transport=transport, random_seed=5
        )
        assert (
            state.process_group is dist.group.WORLD is named.process_group
            and state.stats()["message_bytes"] == 0
        )
        other = hooked(state, rank)
        for step in range(3):  # the buckets are rebuilt after the first
            for ddp in (one, other):
                train(ddp, rank, 1, step)
            assert torch.equal(gradients(one), gradients(other))
        assert state.stats() == named.stats() and list(state.state_dict()["residual"]) == list(
            named.state_dict()["residual"]
        )
    file, weights = folder / f"powersgd.{rank}", copy.deepcopy(other.module.state_dict())
    save_state(state, file)
    train(other, rank, 2, 3)
    resumed = LQSGDState(dist.group.WORLD, 2, bits=4, transport="all_to_all")
    assert load_state(resumed, file) == []
    again = hooked(resumed, rank)
    again.module.load_state_dict(weights)
    train(again, rank, 2, 3)
    assert torch.equal(gradients(again), gradients(other)) and resumed.stats() == state.stats()


def made_like_powersgd_and_wrong(rank, workers, folder):
    group = dist.group.WORLD
    for arguments, options, message in (
        ((None, 2), {"rank": 2}, "rank=2 and matrix_approximation_rank=2 are the same option"),
        ((group,), {"seed": 1, "random_seed": 1}, "seed=1 and random_seed=1 are the same option"),
        ((group,), {"process_group": group}, "Two process groups"),
        (
            (group,),
            {"start_powerSGD_iter": 10},
            "takes the options rank, bits.*start_powerSGD_iter",
        ),
        ((None, True), {}, "rank=True: a whole number"),
        ((None,), {"timeout": 60}, "timeout=60: a datetime.timedelta"),
        ((-100,), {}, "a process group is needed, not -100"),
        (([1, 2],), {}, "Parameters are tensors"),
    ):
        with pytest.raises(CompressionError, match=message):
            LQSGDState(*arguments, **options)
    state = LQSGDState(None, 1 + rank)
    with pytest.raises(CompressionError, match="layout is known after the first step"):
        state.state_dict()
    with pytest.raises(
        CompressionError, match="do not compress alike: rank is 1 on rank 0, 2 on rank 1"
    ):
        train(hooked(state, rank), rank, 1)
    with pytest.raises(
        CompressionError,
        match=r"do not compress alike: shape of 0 is \[4, 5\] on rank 0, \[4, 6\] on rank 1",
    ):
        mean_gradients([torch.zeros(4, 5 + rank)], LQSGDState())
    state, good = LQSGDState(None, 1), register_lqsgd(wrapped(rank), rank=1)
    saved = good.state_dict()
    if rank == 1:  # of another model, as only one rank can know
        saved["factors"] = {}
    assert state.load_state_dict(saved) == []
    with pytest.raises(
        CompressionError, match="Rank 1: The saved factors belongs to other parameters"
    ):
        train(hooked(state, rank), rank, 1)
    shared = LQSGDState()
    train(hooked(shared, rank), rank, 1)
    with pytest.raises(CompressionError, match="each DDP a state of its own"):
        train(hooked(shared, rank), rank, 1)
    for wrong in (None, group, {}):
        ddp = wrapped(rank)
        ddp.register_comm_hook(wrong, lqsgd_hook)
        with pytest.raises(
            CompressionError, match=rf"registered with {type(wrong).__name__}: .*LQSGDState\(ddp\)"
        ):
            loss_of(ddp, rank).backward()


def factors_that_differ_are_noticed(rank, workers, folder):
    ddp = wrapped(rank)
    state = register_lqsgd(ddp, rank=1)
    train(ddp, rank, 2)
    saved = state.state_dict()
    state = register_lqsgd(again := wrapped(rank), rank=1)
    if rank:
        state.load_state_dict(saved)
    with pytest.raises(
        CompressionError,
        match=r"Rank 0 goes on from step 0, rank 1 from another state, of step 2\. Load",
    ):
        train(again, rank, 1)


def copies(rank, workers, folder):
    """By pickle and by deepcopy: all but the group, which is the default one then."""
    for options in ({"parameters": None}, {}):
        first = wrapped(rank)
        state = LQSGDState(**({"parameters": first} | options), rank=2, bits=4)
        first.register_comm_hook(state, lqsgd_hook)
        state.set_loss_scale(4.0)
        train(first, rank, 2)
        with pytest.warns(UserWarning, match="left out of the saved LQSGDState"):
            data = pickle.dumps(state)
        with pytest.warns(UserWarning, match="is the default one now: set state.process_group"):
            pickled = pickle.loads(data)
        with pytest.warns(UserWarning, match="is the default one now"):
            copied = copy.deepcopy(state)
        twins = []
        for twin in (pickled, copied):
            assert twin.process_group is dist.group.WORLD and twin.stats() == state.stats()
            assert all(
                torch.equal(m, state.compressor.residual[n])
                for n, m in twin.compressor.residual.items()
            )
            ddp = hooked(twin, rank, bucket_cap_mb=0.02)
            ddp.module.load_state_dict(first.module.state_dict())
            twins.append(ddp)
        for ddp in (first, *twins):
            train(ddp, rank, 2, 2)
            assert torch.equal(gradients(ddp), gradients(first))
        assert pickled.stats() == state.stats()
    lent = [data]
    dist.broadcast_object_list(lent)  # one rank's copy on all, as torch's hooks are restored
    borrowed = pickle.loads(lent[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(hooked(borrowed, rank), rank, 1)
    assert any("a copy of rank 0's, used by rank" in str(w.message) for w in caught) == (rank > 0)
    alone = pickle.loads(data)
    alone.process_group = [dist.new_group([r]) for r in range(workers)][rank]
    with pytest.warns(UserWarning, match=f"saved with {workers} workers and goes on with 1"):
        ddp = hooked(alone, rank, process_group=alone.process_group)
        train(ddp, rank, 1)
    assert alone.stats()["workers"] == 1 and alone.stats()["bytes_sent_last_step"] == 0
    assert not torch.equal(*[g for g in gather(gradients(ddp))[:2]])
    with pytest.raises(
        CompressionError, match="made for other parameters than these; they differ in"
    ):
        mean_gradients([torch.zeros(3) for _ in state.names], pickle.loads(data))


def what_ddp_ignores(rank, workers, folder):
    """Ignored names with module prefixes, set on the model that DDP wraps or on one inside."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.gain = Net(), nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.inner(x) * self.gain

    left_out = {"inner.layers.1.weight", "inner.norm.bias", "inner.scale"}
    for given in ("ddp", "model", "inside", "nothing"):
        torch.manual_seed(3)
        outer = Outer()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            outer, [*left_out, "gain"]
        )
        ddp = DistributedDataParallel(outer)
        if given == "inside":
            outer.gain.requires_grad_(False)
            ddp = DistributedDataParallel(outer)
        parameters = {"ddp": ddp, "model": outer, "inside": outer.inner, "nothing": None}[given]
        state = LQSGDState(parameters, rank=2)
        ddp.register_comm_hook(state, lqsgd_hook)
        loss_of(ddp, rank).backward()
        prefix = "inner." if given == "inside" else ""
        everything = {n for n, p in outer.named_parameters() if p.requires_grad}
        # DDP calls a parameter of the outermost module ".gain", so that "gain" does not ignore it.
        assert {prefix + n for n in state.names} == everything - left_out
        for name, p in outer.named_parameters():
            if p.grad is not None:
                assert torch.equal(*gather(p.grad)[:2]) == (name not in left_out), name


def exact_where_a_gradient_has_rank_one(rank, workers, folder):
    """As plain all-reduce: torch's hooks are tested so."""
    plain, ddp = (DistributedDataParallel(nn.Linear(1, 5)) for _ in range(2))
    ddp.register_comm_hook(LQSGDState(None, matrix_approximation_rank=1), lqsgd_hook)
    for _ in range(20):
        for model in (plain, ddp):
            model.zero_grad()
            model(torch.tensor([float(rank)])).sum().backward()
        assert torch.equal(ddp.module.weight.grad, plain.module.weight.grad)
        assert ddp.module.weight.grad[0, 0].item() == (workers - 1) / 2
    for transport in ("all_gather", "all_to_all"):
        plain, ddp = (DistributedDataParallel(nn.Linear(40, 24)) for _ in range(2))
        state = register_lqsgd(ddp, rank=1, transport=transport)
        assert list(state.compressor.matrices) == ["weight"]
        for step in range(5):
            for model in (plain, ddp):
                model.zero_grad()
                model(torch.full((2, 40), rank + 1.0 + step)).sum().backward()
            torch.testing.assert_close(
                ddp.module.weight.grad, plain.module.weight.grad, rtol=1e-5, atol=0
            )


def ways_of_using_ddp(rank, workers, folder):
    """Each way hands out what DDP does without the hook, but for the quantiser."""

    def twice(ddp, step):
        loss_of(ddp, rank, step).backward()
        loss_of(ddp, rank, step + 50).backward()

    def accumulated(ddp, step):
        with ddp.no_sync():
            loss_of(ddp, rank, step).backward()
        loss_of(ddp, rank, step + 50).backward()

    def unused(ddp, step):
        loss_of(ddp, rank, step, spare=bool(rank)).backward()

    def once(ddp, step):
        loss_of(ddp, rank, step).backward()

    for name, use, kwargs in (
        ("static graph", once, {"static_graph": True}),
        ("gradients as views", once, {"gradient_as_bucket_view": True}),
        (
            "views of unused ones",
            unused,
            {"gradient_as_bucket_view": True, "find_unused_parameters": True},
        ),
        ("two passes", twice, {}),
        ("accumulation", accumulated, {"gradient_as_bucket_view": True}),
    ):
        plain, ddp = wrapped(rank, **kwargs), hooked(LQSGDState(**WHOLE), rank, **kwargs)
        for step in range(3):
            for model in (plain, ddp):
                model.zero_grad()
                use(model, step)
            wanted, got = gradients(plain), gradients(ddp)
            assert (got - wanted).norm() < 0.05 * wanted.norm(), (name, step)
            assert all(torch.equal(g, got) for g in gather(got)), (name, step)


def other_models_under_ddp(rank, workers, folder):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_wrapper

    class Pair(nn.Module):
        def __init__(self, hook=None):
            super().__init__()
            self.a, self.b = wrapped(rank, seed=1), wrapped(rank, seed=2)
            self.states = [LQSGDState(**WHOLE) for _ in range(2)]
            for part, state in zip((self.a, self.b), self.states, strict=True):
                part.register_comm_hook(state, lqsgd_hook) if hook else None

        def forward(self, x):
            return self.b(checkpoint(self.a, x, use_reentrant=False))

    pair, plain = Pair(True), Pair()
    for step in range(3):
        for model in (pair, plain):
            model.zero_grad()
            loss_of(model, rank, step).backward()
        wanted = gradients(plain)
        assert (gradients(pair) - wanted).norm() < 0.05 * wanted.norm()
    assert [s.stats()["steps"] for s in pair.states] == [3, 3]
    ddp, half = hooked(LQSGDState(**WHOLE), rank), wrapped(rank)
    half.register_comm_hook(LQSGDState(**WHOLE), fp16_compress_wrapper(lqsgd_hook))
    for step in range(2):
        for model in (ddp, half):
            model.zero_grad()
            loss_of(model, rank, step).backward()
        assert (gradients(ddp) - gradients(half)).norm() < 0.02 * gradients(ddp).norm()
    with pytest.raises(RuntimeError, match="can only be called once"):
        ddp.register_comm_hook(LQSGDState(), lqsgd_hook)
    empty = nn.Linear(48, 48)
    empty.nothing = nn.Parameter(torch.zeros(0, 4))
    ddp = DistributedDataParallel(empty, find_unused_parameters=True)
    register_lqsgd(ddp)
    train(ddp, rank, 2)
    assert_same_everywhere(ddp.parameters())
    ddp = hooked(LQSGDState(**WHOLE), rank)
    with ddp.join():  # the first rank has fewer batches
        for step in range(2 + rank):
            ddp.zero_grad()
            loss_of(ddp, rank, step).backward()
    dist.barrier()


def checkpoints_of_other_workers(rank, workers, folder):
    """Saved by two, read by three and by fewer; files missing, stale or damaged."""
    group = [dist.new_group(ranks) for ranks in ([0, 1], [2])][rank == 2]
    where, bad = folder / "two", folder / "bad"
    ddp = wrapped(rank, process_group=group)
    state = register_lqsgd(ddp, rank=2)
    train(ddp, rank, 2)
    for place in (where, bad) if rank < 2 else ():
        assert save_checkpoint(state, place).name == f"lqsgd.rank{rank}.safetensors"
    saved = state.state_dict()
    dist.barrier()
    for made in (lambda ddp: LQSGDState(ddp, rank=2), lambda ddp: LQSGDState(None, 2)):
        ddp = wrapped(rank)
        more = made(ddp)
        with pytest.warns(
            UserWarning, match="saved with 2 workers and goes on with 3: .*residual .*is dropped"
        ):
            assert len(load_checkpoint(more, where)) == 1
        if more.names:
            assert not any(m.any() for m in more.compressor.residual.values())
            assert rank > 1 or all(
                torch.equal(f, saved["factors"][n]) for n, f in more.compressor.factors.items()
            )
        ddp.register_comm_hook(more, lqsgd_hook)
        train(ddp, rank, 1)
        assert_same_everywhere(ddp.parameters())
        assert more.stats()["steps"] == 3
    save_checkpoint(more, where)
    dist.barrier()
    whole = LQSGDState(wrapped(rank), rank=2)
    assert load_checkpoint(whole, where) == [] and any(
        m.any() for m in whole.compressor.residual.values()
    )
    residual = whole.state_dict()["residual"]
    with pytest.warns(UserWarning, match="saved with 3 workers and goes on with [12]:"):
        load_checkpoint(state, where)
    dist.barrier()
    if rank == 1:
        (where / "lqsgd.rank1.safetensors").unlink()
    if rank == 2:  # one of another save
        more.counts.steps += 1
        save_checkpoint(more, where)
    dist.barrier()
    with pytest.warns(
        UserWarning, match=r"no LQ-SGD state of ranks \[1, 2\], or one of another save"
    ):
        load_checkpoint(whole, where)
    assert all(
        torch.equal(m, residual[n] * (rank == 0)) for n, m in whole.compressor.residual.items()
    )
    dist.barrier()
    if rank < 2:
        save_checkpoint(state, where)
        (bad / "lqsgd.rank0.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    dist.barrier()
    assert sorted(f.name for f in where.iterdir()) == [
        f"lqsgd.rank{r}.safetensors" for r in range(2)
    ]  # no stale third one
    with pytest.raises(
        CompressionError, match=r"Rank 0: .*missing, damaged, or holds no LQ-SGD state"
    ):
        load_checkpoint(whole, bad)
    with pytest.raises(
        CompressionError,
        match="Rank 0: The saved factors belongs to other parameters or factors of another rank",
    ):
        load_checkpoint(LQSGDState(Net(), rank=3), where)
    with pytest.warns(
        UserWarning, match="holds no LQ-SGD state: compression goes on with an empty residual"
    ):
        load_checkpoint(whole, folder / "none")
    assert whole.stats()["steps"] == 0 and not any(
        m.any() for m in whole.compressor.residual.values()
    )


def resuming_in_the_trainer(rank, workers, folder):
    """From the checkpoint that is resumed from, not from another; without one, with a warning."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from hipp_ext.comm.saving import read_state
    from hipp_ext.comm.trainer import LQSGDCallback

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.net = Net()

        def forward(self, x):
            return {"loss": (self.net(x, spare=False) - x.roll(1, 1)).square().mean()}

    data = [{"x": x} for x in torch.randn(64, 48, generator=torch.Generator().manual_seed(5))]

    def trainer(steps, out="run", compressed=True):
        arguments = TrainingArguments(
            output_dir=str(folder / out),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            use_cpu=True,
            ddp_backend="gloo",
            report_to=[],
            disable_tqdm=True,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_only_model=True,
            optim="sgd",
            gradient_accumulation_steps=2,
            ddp_find_unused_parameters=True,
            logging_steps=100,
            save_total_limit=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            label_names=["x"],
        )
        made, begun = (
            Trainer(model=Loss(), args=arguments, train_dataset=data, eval_dataset=data[:8]),
            [],
        )

        class Peek(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if compressed and not begun:
                    begun.append((state.global_step, callback.state.state_dict()))

        if compressed:
            callback = LQSGDCallback(made, rank=2, bits=8)
            made.add_callback(callback)
        made.add_callback(Peek())
        return made, begun

    def residual_of(file):
        return read_state(folder / file / f"lqsgd.rank{rank}.safetensors")["residual"]

    def same(one, other):
        return all(torch.equal(m, other[n]) for n, m in one.items())

    made, _ = trainer(4)
    made.train()
    weights = flat(made.model.parameters())
    at = {step: residual_of(f"run/checkpoint-{step}") for step in (2, 4)}
    assert not same(at[2], at[4])
    for out, asked in (("run", "run/checkpoint-2"), ("new", "run/checkpoint-2"), ("new", True)):
        step = 4 if asked is True else 2
        again, begun = trainer(step + 2, out)
        again.train(resume_from_checkpoint=asked is True or str(folder / asked))
        assert begun[0][0] == step and begun[0][1]["counts"]["steps"] == step
        assert same(begun[0][1]["residual"], at[step]), (out, asked)
        if asked is not True:  # to the bit, as if never interrupted
            assert same(residual_of(f"{out}/checkpoint-4"), at[4])
            assert torch.equal(flat(again.model.parameters()), weights)
    del begun[:]
    again.train()  # anew, on the DDP that has the hook
    assert begun[0][0] == 0 and not any(m.any() for m in begun[0][1]["residual"].values())
    plain, _ = trainer(2, "plain", compressed=False)
    plain.train()
    late, begun = trainer(4, "plain")
    with pytest.warns(
        UserWarning,
        match="checkpoint-2 holds no LQ-SGD state: compression goes on with an empty residual",
    ):
        late.train(resume_from_checkpoint=True)
    assert begun[0][0] == 2 and not any(m.any() for m in begun[0][1]["residual"].values())
    if rank == 1:
        (folder / "plain/checkpoint-4/lqsgd.rank1.safetensors").write_bytes(b"no")
    dist.barrier()
    with pytest.raises(
        CompressionError, match="Rank 1: .*missing, damaged, or holds no LQ-SGD state"
    ):
        trainer(6, "plain")[0].train(resume_from_checkpoint=True)


class Distilled(nn.Module):
    """The loss of a student, computed in the forward pass of what DDP wraps."""

    def __init__(self, objective: Distillation, student: nn.Module):
        super().__init__()
        self.objective, self.student = objective, student

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.objective.losses(self.student, batch)


def distilling_like_one_process(rank, workers, folder):
    """The head gets its gradient in DDP's graph, chunk by chunk; a tower may be unused."""
    options = {"memory_limit": 3 * 97 * 4, "hidden_share": 0.2, "cross_entropy_share": 0.1}
    for tied in (False, True):
        teacher, student = build("llava"), build("llava", seed=1)
        if tied:
            student.lm_head.weight = student.get_input_embeddings().weight
        objective = Distillation(ModelTeacher(teacher), **options)
        batches = [make_batch("llava", seed=other, labels=True) for other in range(workers)]
        for batch in batches[1:]:  # without pictures
            del batch["pixel_values"]
            batch["input_ids"][batch["input_ids"] == 5] = 11
        twin = copy.deepcopy(student)
        for batch in batches:
            (objective.losses(twin, batch)["loss"] / workers).backward()
        ddp = DistributedDataParallel(Distilled(objective, student), find_unused_parameters=True)
        for _ in range(2):  # the buckets are rebuilt after the first
            ddp.zero_grad()
            ddp(batches[rank])["loss"].backward()
        for (name, p), q in zip(student.named_parameters(), twin.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
        assert student.lm_head.weight.grad.any() and len(list(twin.parameters())) > 20
