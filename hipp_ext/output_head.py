"""What a model does between its last hidden state and its logits, found by comparison with the model itself.

Some models scale their logits (Granite, Cohere, Falcon-H1), some cap them softly (Gemma 2). The configuration of the text model
does not tell: vision-language wrappers have a head of their own, and most of them do neither.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups import decoder
from hipp_ext.scorers.base import forward

CAPS = ("final_logit_softcapping", "logits_soft_cap")  # what configurations call it
UNSATURATED = 0.9  # share of the cap up to which a capped logit tells the uncapped one
FLOAT32_NOISE = (
    2.5e-5  # relative to the largest logit: what another order of summation makes of float32
)
SAME_SCALE = 1e-3  # a measured scale as close to 1 is 1: half precision measures no better


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """`head(model, hidden)`: the output embeddings, then a scale, then a soft cap.

    Attributes:
        scale: what the output embeddings' result is multiplied by.
        cap: c of c tanh(logits / c); None: not capped.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(
        self, model: nn.Module, hidden: Float[Tensor, "rows hidden"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """The logits of hidden states after the language tower, float32, on the CPU."""
        return self.of(project(model, hidden))

    def of(self, projected: Tensor) -> Tensor:
        """The logits, given what the output embeddings returned."""
        logits = projected * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def project(model: nn.Module, hidden: Tensor) -> Tensor:
    """What the output embeddings make of hidden states, float32, on the CPU."""
    return model.get_output_embeddings()(hidden).float().cpu()  # type: ignore[operator]


@torch.no_grad()
def fit_output_head(
    model: nn.Module, batch: Batch, positions: Int[Tensor, " rows"]
) -> tuple[OutputHead, Float[Tensor, "rows vocabulary"]]:
    """The head that gives what `model(**batch)` gives, and the model's own logits at one position of every row.

    Cost: one forward pass.

    Args:
        model: in eval mode.
        batch: as the model's forward takes it.
        positions: of each row.

    Raises:
        UnsupportedModelError: no scale and none of the soft caps that its configuration names gives the model's logits.
    """
    hidden, logits = _run(model, batch, positions)
    projected = project(model, hidden)
    candidates = [
        OutputHead(scale=_scale(projected, logits, cap), cap=cap) for cap in (None, *_caps(model))
    ]
    errors = [float((head.of(projected) - logits).abs().max()) for head in candidates]
    error, head = min(zip(errors, candidates, strict=True), key=lambda pair: pair[0])
    if not error <= tolerance(model, logits):
        capped = "" if head.cap is None else f" and capped at {head.cap:g}"
        raise UnsupportedModelError(
            f"{type(model).__name__} does something to its logits that is not known here: its output embeddings applied to the "
            f"last hidden states, scaled by {head.scale:.4g}{capped}, still differ from model(**batch).logits by {error:.3g} "
            f"(the logits go up to {float(logits.abs().max()):.3g})."
        )
    return head, logits


def tolerance(model: nn.Module, logits: Tensor, roundings: int = 4) -> float:
    """How far logits may differ that went through so many more roundings in the model's precision."""
    precision = torch.finfo(next(p.dtype for p in model.parameters() if p.is_floating_point())).eps
    return roundings * max(FLOAT32_NOISE, precision) * max(float(logits.abs().max()), 1e-6)


def _run(model: nn.Module, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(last hidden states, float32 logits on the CPU) at `positions`, from one forward pass of the whole model."""
    seen: list[Any] = []
    handle = decoder(model).register_forward_hook(lambda _, __, output: seen.append(output))
    # Logits of all tokens would take more memory than the rest of the pass. (Indices would have to lie where the head does.)
    positions, length = positions.cpu(), batch["input_ids"].shape[1]
    last = length - int(positions.min())
    few = "logits_to_keep" in inspect.signature(model.forward).parameters
    try:
        output = forward(model, batch, **({"logits_to_keep": last} if few else {}))
    finally:
        handle.remove()
    hidden, logits = (
        getattr(seen[-1] if seen else None, "last_hidden_state", None),
        getattr(output, "logits", None),
    )
    if hidden is None or logits is None or model.get_output_embeddings() is None:  # type: ignore[operator]
        raise UnsupportedModelError(
            f"{type(model).__name__} gives no logits of its decoder's last hidden states: a language head is needed."
        )
    rows = torch.arange(len(positions))
    logits = logits[:, -last:].cpu()[rows, positions - length].float()
    return hidden[rows, positions.to(hidden.device)], logits


def _scale(projected: Tensor, logits: Tensor, cap: float | None) -> float:
    """The scale that brings `projected` closest to the logits before the cap."""
    x, y = projected.double(), logits.double()
    if cap is not None:
        open_ = y.abs() < UNSATURATED * cap
        x, y = x[open_], cap * torch.atanh(y[open_] / cap)
    square = float((x * x).sum())
    scale = float((x * y).sum()) / square if square else 1.0
    return 1.0 if abs(scale - 1) < SAME_SCALE else scale


def _caps(model: nn.Module) -> list[float]:
    """The soft caps that the configurations of the model and of its language tower name."""
    config: Any = model.config
    found = [getattr(c, name, None) for c in (config, config.get_text_config()) for name in CAPS]
    return list(dict.fromkeys(float(cap) for cap in found if cap))
