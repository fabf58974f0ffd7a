"""What is recovered: the testbed's model, and SmolLM2-135M, with rows to train on and held out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from hipp_ext import load_pruned, prune, save_pruned, testbed
from hipp_ext.allocators import Uniform
from hipp_ext.budget import Bounds
from hipp_ext.calibration import encode
from hipp_ext.evals.studies.real_lm import model as smollm2
from hipp_ext.evals.studies.real_lm.text import Corpus, TextSize, read_text, row_losses
from hipp_ext.evals.studies.real_lm.text_rows import TextRows
from hipp_ext.evals.studies.recovery.pictures import pruning_plan
from hipp_ext.recover import DataSource, TestbedData


class Loaded(Protocol):
    """A pruned model with its rows."""

    model: Any

    def data(self, seed: int) -> DataSource:
        """Rows to train on."""
        ...

    def held_out_loss(self) -> float:
        """Loss of `model` on rows that are not trained on [nats per token]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model to recover.

    Attributes:
        name: name in tables.
        settings: settings of `RecoverSettings` that all methods share.
        seconds: rate of the link [Mbit/s] -> times to train for.
        steps: steps of LQ-SGD whose bytes the others may send, in as many steps at most.
        seeds: seeds of the order of the rows, of dropout and of the factors.
        timed_ways: rate -> ways to send whose exchange is timed there; others take too long.
    """

    name: str
    settings: dict[str, Any]
    seconds: dict[int, tuple[int, ...]]
    steps: int
    seeds: int
    timed_ways: dict[int, tuple[str, ...]]

    def make(self, folder: Path) -> None:
        """Save the pruned model into `folder`, if it is not there."""
        if not folder.exists():
            _MAKE[self.name](folder)

    def load(self, folder: Path) -> Loaded:
        """The pruned model from `folder`, with its rows."""
        return _LOAD[self.name](folder)


class _Testbed:
    def __init__(self, folder: Path):
        self.model, self.processor = load_pruned(folder), testbed.load()[1]

    def data(self, seed: int) -> DataSource:
        return TestbedData(self.processor, seed)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        losses = []
        for task in testbed.TASKS:
            asked = testbed.questions(task, "validation", 384)
            for rows in (asked[i : i + 48] for i in range(0, len(asked), 48)):
                parts = ([getattr(q, n) for q in rows] for n in ("prompt", "image", "answer"))
                losses.append(self.model(**encode(self.processor, *parts)).loss)
        return float(torch.stack(losses).double().mean())


class _SmolLM2:
    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        self.model = load_pruned(folder)
        self.corpus = _corpus(AutoTokenizer.from_pretrained(folder))

    def data(self, seed: int) -> DataSource:
        return TextRows(self.corpus.rest, batch_size=2, seed=seed)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        return float(row_losses(self.model, self.corpus.test).mean())


def _corpus(tokenizer: Any) -> Corpus:
    return Corpus(read_text(None), tokenizer, TextSize())


def _make_testbed(folder: Path) -> None:
    model, processor = testbed.load()
    save_pruned(prune(model, pruning_plan(model, processor)), folder, processor)


def _make_smollm2(folder: Path) -> None:
    model, tokenizer = smollm2.load()
    calibration = _corpus(tokenizer).calibration(0)
    allocator = Uniform(pruning_ratio=0.3, bounds=Bounds(round_to=32))
    plan = allocator.plan(model, calibration=calibration)
    small: nn.Module = prune(model, plan, reconstruct=True, calibration=calibration)
    save_pruned(small, folder, tokenizer)


_MAKE = {"testbed": _make_testbed, "smollm2": _make_smollm2}
_LOAD: dict[str, Any] = {"testbed": _Testbed, "smollm2": _SmolLM2}
TASKS = {
    "testbed": Task(
        name="testbed",
        settings={},
        seconds={100: (15,), 10: (30,)},
        steps=120,
        seeds=3,
        timed_ways={100: ("plain", "lqsgd"), 10: ("plain", "lqsgd")},
    ),
    "smollm2": Task(
        name="smollm2",
        settings={"optimizer": "adamw", "lr": 3e-4, "precision": "bf16"},
        seconds={100: (90,), 10: (240,)},
        steps=40,
        seeds=1,
        timed_ways={100: ("plain", "lqsgd"), 10: ("lqsgd",)},
    ),
}
