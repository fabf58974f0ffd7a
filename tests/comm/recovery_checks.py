"""Checks of `recover` on real gloo processes, run by `comm.processes`: rows of a file, sharding."""

from dataclasses import replace

import pytest
import torch
from recover.test_file_data import lines, texts
from recover.test_training import (
    UNEQUAL,
    Repeated,
    assert_learnt_the_same,
    data,
    learnt,
    pruned,
    unequal,
)

from comm.processes import assert_same_everywhere, flat
from hipp_ext.errors import CheckpointError, HippError
from hipp_ext.recover import RecoverSettings, checkpoints, recover

SETTINGS = RecoverSettings(
    steps=4, lr=1e-2, optimizer="adamw", evaluate_every=2, accumulation=2, rank=2, save_every=1
)


class CutOff:
    """A source that ends before step `steps`, as a run does that is interrupted."""

    token_mean = True

    def __init__(self, source, steps: int):
        self.source, self.steps = source, steps

    def __getattr__(self, name):
        return getattr(self.source, name)

    def batches(self, rank, workers, start):
        for number, batch in enumerate(self.source.batches(rank, workers, start), start):
            if number == self.steps:
                raise KeyboardInterrupt
            yield batch


def recovered(folder, settings=SETTINGS, steps=None, **options):
    rows = [*texts(40), {"messages": [{"role": "user", "content": "no answer"}]}]
    folder.parent.mkdir(exist_ok=True)
    own = folder.parent / f"rows.{torch.distributed.get_rank()}.jsonl"
    source = data(lines(own, rows), batch_size=2)
    model = pruned()
    source = source if steps is None else CutOff(source, steps)
    return model, recover(model, source, settings, folder=folder, progress=False, **options)


def recovering_on_rows_of_a_file(rank, workers, folder):
    shared = folder / "rows"
    shared.mkdir(exist_ok=True)
    for train in ("full", "lora"):
        settings = replace(SETTINGS, train=train)
        model, result = recovered(shared / train, settings)
        assert_same_everywhere(model.parameters())
        assert result.evaluations[-1]["loss"] < result.evaluations[0]["loss"]
        assert result.rows == 4 * 2 * 2 * workers and result.stats["bytes_sent"] > 0
        with pytest.raises(KeyboardInterrupt):
            recovered(shared / f"{train}-cut", settings, steps=5)
        again, resumed = recovered(shared / f"{train}-cut", settings)
        assert torch.equal(flat(again.parameters()), flat(model.parameters()))
        assert resumed == result


def a_position_is_worth_the_same_on_any_process(rank, workers, folder):
    whole, parts = unequal()
    for number, options in enumerate(UNEQUAL.values()):
        runs = [folder / f"{name}-{number}" for name in ("whole", "parts")]
        expected = learnt(Repeated([whole] * 2), runs[0], options, compression="none")
        found = learnt(Repeated(parts), runs[1], options, compression="none")
        assert_same_everywhere([found[0]])
        assert_learnt_the_same(found, expected)


def a_sharded_model_recovers_like_a_whole_one(rank, workers, folder):
    shared = folder / "sharded"
    shared.mkdir(exist_ok=True)
    settings = replace(SETTINGS, compression="none")
    whole, expected = recovered(shared / "whole", settings)
    spread = replace(settings, sharding="fsdp")
    model, result = recovered(shared / "spread", spread)
    assert_same_everywhere(model.parameters())
    assert result.losses == pytest.approx(expected.losses, abs=1e-4)
    torch.testing.assert_close(
        flat(model.parameters()), flat(whole.parameters()), rtol=0, atol=1e-3
    )
    with pytest.raises(KeyboardInterrupt):
        recovered(shared / "cut", spread, steps=5)
    again, resumed = recovered(shared / "cut", spread)
    assert torch.equal(flat(again.parameters()), flat(model.parameters())) and resumed == result
    adapted, _ = recovered(shared / "lora", replace(spread, train="lora", steps=1))
    assert_same_everywhere(adapted.parameters())
    with pytest.raises(HippError, match="measure= needs the whole model in one process"):
        recovered(shared / "measured", spread, measure=lambda model: {})


def folders_that_are_not_shared_are_refused(rank, workers, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "VISIBLE_SECONDS", 0.0)
        with pytest.raises(CheckpointError, match="what process 0 writes there is not seen by 1"):
            recovered(folder / f"alone-{rank}" / "run")
