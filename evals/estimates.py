"""What planning and recovery will take, before anything is loaded: FLOPs, memory, time.

FLOPs and bytes are counted from the shapes of the model. Time is FLOPs over a rate that is measured
here. All of it is an estimate: reading files, attention kernels and idle processors are left out.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hipp_ext.budget.active import size_of
from hipp_ext.calibration import Calibration
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups import Group, find_groups, tower_layers
from hipp_ext.planner.cost import cost_of
from hipp_ext.recover.settings import RecoverSettings
from hipp_ext.sensitivity.efforts import forward_passes
from hipp_ext.sensitivity.fisher import MEMORY_LIMIT, token_bytes
from hipp_ext.sensitivity.measured import DENSE_BYTES
from hipp_ext.towers import projected_tokens

BATCH = 8  # rows, of calibration and of recovery
SCORING_PASSES = 2.0  # WandaSP and visual sensitivity
# Part of the rate of large matrix products that whole models reach. On a CPU core in float32 a
# Llama of 27M parameters reached 0.80 in scoring, and 0.62 to 0.68 in the three efforts.
UTILISATION = 0.5
# Bytes of weight, gradient and states of the optimizer for a parameter that is trained.
MUON_BYTES, ADAMW_BYTES = 12, 16
# Sizes of the matrices whose products are timed. Larger ones follow until they have taken ENOUGH
# seconds in all, so that other work on the machine does not decide.
SMALLEST, LARGEST = 1024, 8192
ENOUGH = 0.3


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one command will take.

    Attributes:
        command: the command, with the option that matters.
        flops: floating-point operations, two per multiply-accumulate.
        bytes: of memory, where the model is.
    """

    command: str
    flops: int
    bytes: int


def estimate(model: nn.Module, groups: Sequence[Group], rows: int, tokens: int) -> list[Estimate]:
    """Estimates of planning by every effort, and of recovery of all weights or by adapters.

    Args:
        model: the dense model; it may be on the meta device.
        groups: what is pruned.
        rows: rows of the calibration.
        tokens: tokens of a row, those of a picture included.
    """
    forward = forward_flops(model, tokens)
    weights = sum(p.nbytes for p in model.parameters())
    activations = BATCH * tokens * token_bytes(model, "language")
    found = []
    layers = len(tower_layers(model, "language"))
    for effort in ("fisher", "anchored", "measured"):
        passes = SCORING_PASSES + forward_passes(groups, layers, effort)
        memory = weights + min(activations, MEMORY_LIMIT) + DENSE_BYTES
        found.append(
            Estimate(
                command=f"plan --effort {effort}", flops=int(passes * rows * forward), bytes=memory
            )
        )
    settings = RecoverSettings()
    learnt = settings.steps * BATCH * forward
    full = activations + _training_bytes(model)
    adapters = activations + weights + ADAMW_BYTES * _adapter_parameters(model, settings.lora_rank)
    return [
        *found,
        Estimate(command="recover", flops=3 * learnt, bytes=full),
        Estimate(command="recover --train lora", flops=2 * learnt, bytes=adapters),
    ]


def pass_flops(model: nn.Module, calibration: Calibration) -> float:
    """FLOPs of a forward pass over a calibration, padding included.

    Models that see are counted with a picture in every row.
    """
    by_length: Counter[int] = Counter()
    for batch in calibration.batches:
        rows, length = batch["input_ids"].shape
        by_length[length] += rows
    return float(sum(n * forward_flops(model, length) for length, n in by_length.items()))


def row_tokens(model: Any, text_tokens: int) -> int:
    """Tokens of a row of so much text; models that see have a picture in every row."""
    seeing = getattr(model.config, "vision_config", None) is not None
    return text_tokens + (projected_tokens(model.config) if seeing else 0)


def forward_flops(model: Any, tokens: int) -> int:
    """FLOPs of one row through all towers; attention over the row included."""
    flops = tokens * size_of(model).flops
    for tower in ("language", "vision", "projector"):
        try:
            groups = find_groups(model, (tower,), partial="report")
        except UnsupportedModelError:
            continue
        if tower == "language":
            flops += tokens * sum(g.width * g.context_flops(tokens) for g in groups)
        else:
            flops += cost_of(groups, "flops", tokens=tokens)([g.width for g in groups])
    return flops


def measure_rate(device: str, dtype: torch.dtype) -> float:
    """FLOPs per second of matrix products on a device, of as large ones as take little time."""
    size, best, total = SMALLEST, 0.0, 0.0
    while total < ENOUGH and size <= LARGEST:
        left = torch.ones(size, size, device=device, dtype=dtype)
        for _ in range(3):
            begun = time.perf_counter()
            (left @ left)[0, 0].item()  # waits for a GPU
            seconds = time.perf_counter() - begun
            best, total = max(best, 2 * size**3 / seconds), total + seconds
        size *= 2
    return best


def _training_bytes(model: nn.Module) -> int:
    """Bytes of training all parameters: Muon for the matrices of the language tower's layers."""
    hidden = {id(p) for p in tower_layers(model, "language").parameters() if p.dim() == 2}
    return sum(
        p.numel() * (MUON_BYTES if id(p) in hidden else ADAMW_BYTES) for p in model.parameters()
    )


def _adapter_parameters(model: Any, rank: int) -> int:
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if type(m) is nn.Linear and m is not head]
    return rank * sum(sum(m.weight.shape) for m in linears)
