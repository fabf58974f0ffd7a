"""One recovery of the study: what is trained, from where, and how."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Start = Literal["reconstructed", "sliced"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to recover.

    Attributes:
        teacher: the model learns from the dense one's distributions, else from the labels.
        labels: beside the teacher, the share of the labels' cross-entropy in the loss.
        start: "reconstructed": consumers were fitted by least squares before; "sliced": not.
        train: see `RecoverSettings`.
        compression: two processes send gradients by LQ-SGD ("lqsgd") or whole ("none"); None:
            there is one process.
    """

    teacher: bool = True
    labels: float = 0.0
    start: Start = "reconstructed"
    train: Literal["full", "lora"] = "full"
    compression: Literal["lqsgd", "none"] | None = None


BASE, LABELS = "distillation", "cross-entropy"
# The last two are compared with each other: two processes see twice as many rows.
ARMS: Mapping[str, Arm] = {
    BASE: Arm(),
    LABELS: Arm(teacher=False),
    "no reconstruction": Arm(start="sliced"),
    "LoRA": Arm(train="lora"),
    "teacher and labels": Arm(labels=0.5),
    "LQ-SGD": Arm(teacher=False, start="sliced", compression="lqsgd"),
    "all-reduce": Arm(teacher=False, start="sliced", compression="none"),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One recovery; its `name` is that of its files."""

    ratio: float
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Ratio, arm and seed."""
        return f"{self.ratio:.0%} {self.arm}, seed {self.seed}"


def start_name(ratio: float, start: Start) -> str:
    """Name of a pruned model before its recovery."""
    return f"{ratio:.0%} {start}"
