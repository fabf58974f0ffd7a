"""How a model computes its logits from its last hidden state, found by comparison with the model.

Some models scale their logits (Granite, Cohere, Falcon-H1), others cap them softly (Gemma 2). The
configuration of the text model is not enough to know: vision-language wrappers have their own head,
and most of them do neither.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import LOGIT_CAPS
from hipp_ext.groups import decoder
from hipp_ext.scorers.base import forward

# logits above this share of the cap are saturated and not used to measure the scale
MAX_CAP_SHARE = 0.9
# Difference of float32 logits due to another order of summation, relative to the largest logit.
FLOAT32_NOISE = 2.5e-5
BLOCKED = -1e30  # logits below are of tokens that a model never puts out (Chameleon: pictures)
SCALE_TOLERANCE = 1e-3  # a measured scale this close to 1 counts as 1, the precision of half floats


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """`head(model, hidden)`: the output embeddings, then a scale, then a soft cap.

    Attributes:
        scale: factor on the result of the output embeddings.
        cap: c in c * tanh(logits / c); None for no cap.
        blocked: tokens whose logits are always the least number there is.
    """

    scale: float = 1.0
    cap: float | None = None
    blocked: tuple[int, ...] = ()

    def __call__(
        self, model: nn.Module, hidden: Float[Tensor, "rows hidden"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """The logits for hidden states after the language tower, float32, on the head's device."""
        return self.of(project(model, hidden))

    def of(self, projected: Tensor) -> Tensor:
        """The logits, computed from the result of the output embeddings."""
        logits = projected * self.scale
        logits = logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
        if not self.blocked:
            return logits
        tokens = torch.tensor(self.blocked, device=logits.device)
        return logits.index_fill(-1, tokens, torch.finfo(logits.dtype).min)


def project(model: nn.Module, hidden: Tensor) -> Tensor:
    """The result of the output embeddings for hidden states, float32, on their device."""
    return model.get_output_embeddings()(hidden).float()  # type: ignore[operator]


def logit_bytes(model: nn.Module) -> int:
    """Bytes of the float32 logits of one position."""
    return 4 * model.get_output_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]


@torch.no_grad()
def fit_output_head(
    model: nn.Module,
    batch: Batch,
    positions: Int[Tensor, " positions"],
    rows: Int[Tensor, " positions"] | None = None,
) -> tuple[OutputHead, Float[Tensor, "positions vocabulary"]]:
    """The head of the model, and the model's own logits at some positions.

    Cost: one forward pass, with the logits from the first of the positions on.

    Args:
        model: a model in eval mode.
        batch: inputs of the model's forward.
        positions: position of the logits in its row.
        rows: row of each position; None: every row has one.

    Raises:
        UnsupportedModelError: no scale, with or without a soft cap of its configuration, gives the
            model's logits; or there is NaN among them.
    """
    rows = torch.arange(len(positions)) if rows is None else rows
    hidden, logits = _run(model, batch, rows, positions)
    check_no_nan(model, logits)
    projected = project(model, hidden).cpu()
    free = (logits > BLOCKED).any(0)
    blocked = tuple((~free).nonzero()[:, 0].tolist())
    candidates = [
        OutputHead(scale=_scale(projected[:, free], logits[:, free], cap), cap=cap, blocked=blocked)
        for cap in (None, *_caps(model))
    ]
    errors = [float((head.of(projected) - logits)[:, free].abs().max()) for head in candidates]
    error, head = min(zip(errors, candidates, strict=True), key=lambda pair: pair[0])
    if not error <= tolerance(model, logits):
        capped = "" if head.cap is None else f" and capped at {head.cap:g}"
        raise UnsupportedModelError(
            f"{type(model).__name__} computes its logits in an unknown way: its output "
            "embeddings, applied to the last hidden states and scaled by "
            f"{head.scale:.4g}{capped}, still differ from model(**batch).logits by {error:.3g} "
            f"(the logits go up to {float(logits[:, free].abs().max()):.3g})."
        )
    # The least number of the model's own precision is another one in float32.
    return head, logits.masked_fill(~free, torch.finfo(logits.dtype).min)


def check_no_nan(model: nn.Module, values: Tensor) -> None:
    """Raise UnsupportedModelError if a model's logits or log-probabilities have NaN among them."""
    if bool(values.isnan().any()):
        raise UnsupportedModelError(
            f"{type(model).__name__} gave NaN for the next token: its weights or activations are "
            "not finite on this data (fp16 overflow? try bfloat16)."
        )


def tolerance(model: nn.Module, logits: Tensor, roundings: int = 4) -> float:
    """Largest difference in logits due to `roundings` more roundings in the model's precision, the
    least one if its parameters have several.
    """
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    precision = max(torch.finfo(dtype).eps for dtype in types)
    largest = float(logits[logits > BLOCKED].abs().max())
    return roundings * max(FLOAT32_NOISE, precision) * max(largest, 1e-6)


def _run(model: nn.Module, batch: Batch, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden states and float32 logits on the CPU at `positions`, from one forward pass."""
    seen: list[Any] = []
    handle = decoder(model).register_forward_hook(lambda _, __, output: seen.append(output))
    # The logits of all tokens would need more memory than the rest of the pass. A number works on
    # any device; a tensor of indices would have to be on the device of the head.
    positions, length = positions.cpu(), batch["input_ids"].shape[1]
    last = length - int(positions.min())
    few = "logits_to_keep" in inspect.signature(model.forward).parameters
    try:
        options: dict[str, Any] = {"logits_to_keep": last} if few else {}
        output = forward(model, batch, **options)
    finally:
        handle.remove()
    hidden, logits = (
        getattr(seen[-1] if seen else None, "last_hidden_state", None),
        getattr(output, "logits", None),
    )
    if hidden is None or logits is None or model.get_output_embeddings() is None:  # type: ignore[operator]
        raise UnsupportedModelError(
            f"{type(model).__name__} has no logits of its decoder's last hidden states; a model "
            "with a language head is needed."
        )
    logits = logits[:, -last:].cpu()[rows, positions - length].float()
    return hidden[rows.to(hidden.device), positions.to(hidden.device)], logits


def _scale(projected: Tensor, logits: Tensor, cap: float | None) -> float:
    """The scale that minimises the squared distance of `projected` to the logits before the cap."""
    x, y = projected.double(), logits.double()
    if cap is not None:
        unsaturated = y.abs() < MAX_CAP_SHARE * cap
        x, y = x[unsaturated], cap * torch.atanh(y[unsaturated] / cap)
    square = float((x * x).sum())
    scale = float((x * y).sum()) / square if square else 1.0
    return 1.0 if abs(scale - 1) < SCALE_TOLERANCE else scale


def _caps(model: nn.Module) -> list[float]:
    """The soft caps in the configurations of the model and of its language tower."""
    config: Any = model.config
    found = [
        getattr(c, name, None) for c in (config, config.get_text_config()) for name in LOGIT_CAPS
    ]
    return list(dict.fromkeys(float(cap) for cap in found if cap))
