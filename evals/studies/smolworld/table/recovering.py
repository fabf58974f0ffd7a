"""Equal recovery: every pruned model learns from the dense one, from the same rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hipp_ext.calibration import Batch
from hipp_ext.evals.studies.smolworld.conversations import PER_STEP, Conversations
from hipp_ext.evals.studies.smolworld.table.bench import Bench
from hipp_ext.recover import CachedTeacher, RecoverSettings, precompute, recover

LR = 3e-4  # of SmolLM2 on text, by the study of recovery
TOP_K = 64


class Lessons:
    """The conversations of the first steps of training, for `recover` and for its teacher.

    Args:
        conversations: the world's conversations.
        steps: number of steps.

    Attributes:
        identity: what must be equal for two sources to give the same rows.
    """

    def __init__(self, conversations: Conversations, steps: int):
        self.conversations, self.steps = conversations, steps
        self.identity = {**conversations.identity, "steps": steps}

    def __len__(self) -> int:
        return self.steps

    def once(self, start: int) -> Iterator[list[Batch]]:
        """See `RowSource.once`."""
        rest = self.conversations.batches(0, 1, start)
        return (batches for _, batches in zip(range(start, self.steps), rest, strict=False))

    def batches(self, rank: int, workers: int, start: int) -> Iterator[list[Batch]]:
        """See `DataSource.batches`."""
        return self.conversations.batches(rank, workers, start)


def recovered(bench: Bench, model: Any, folder: Path) -> Any:
    """`model` after equal recovery, in place; an interrupted one goes on in `folder`.

    The vision tower stays as it is.
    """
    sizes = bench.sizes
    settings = RecoverSettings(
        steps=sizes.steps,
        optimizer="adamw",
        lr=LR,
        schedule="cosine",
        freeze_vision=True,
        precision="float32" if sizes.dtype == "float32" else "bf16",
        compression="none",
        top_k=_words(bench),
        save_every=min(20, sizes.steps),
    )
    recover(model, _lessons(bench), settings, folder=folder, teacher=teach(bench))
    return model


def teach(bench: Bench) -> CachedTeacher:
    """What the dense model says about all rows, kept in the folder; all recoveries share it."""
    folder = bench.folder / "teacher"
    return precompute(
        bench.dense,
        _lessons(bench),
        folder,
        top_k=_words(bench),
        processor=bench.processor,
        progress=True,
    )


def _lessons(bench: Bench) -> Lessons:
    data = Conversations(bench.world, bench.processor, rows=PER_STEP, held=0, seed=1)
    return Lessons(data, bench.sizes.steps)


def _words(bench: Bench) -> int:
    return min(TOP_K, bench.dense.config.get_text_config().vocab_size)
