"""Teachers: what a student's next-token distributions are compared with."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.fingerprint import model_digest
from hipp_ext.groups import check_loaded, tower_layers
from hipp_ext.modes import evaluating
from hipp_ext.output_head import OutputHead, fit_output_head
from hipp_ext.recover.divergence import Distribution, Full, TopK
from hipp_ext.recover.layers import recorded
from hipp_ext.recover.places import Places, Positions
from hipp_ext.recover.vocabulary import Vocabulary
from hipp_ext.replay import whole_pass

HEAD_POSITIONS = 64  # positions at which a head is compared with the model's own logits


@runtime_checkable
class Targets(Protocol):
    """What a teacher says about one batch.

    Attributes:
        states: number of a layer -> its hidden states at the places.
    """

    @property
    def states(self) -> Mapping[int, Float[Tensor, "positions width"]]: ...

    def distribution(self, part: slice, device: torch.device) -> Distribution:
        """The distributions at some of the places, on a device."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """A source of targets.

    Attributes:
        vocabulary: what its logits stand for.
        layers: number of layers whose hidden states it can give; 0: none.
        identity: what must be equal for two teachers to say the same, as JSON values.
    """

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def layers(self) -> int: ...

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def check(self, *, temperature: float, positions: Positions, top_k: int | None) -> None:
        """Raise HippError unless it can give targets of these settings; see `Distillation`."""
        ...

    def targets(
        self,
        batch: Batch,
        places: Places,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        layers: Sequence[int] = (),
    ) -> Targets:
        """The targets of a batch.

        Args:
            batch: inputs of the model's forward.
            places: positions that are compared.
            temperature: temperature of the distributions.
            top_k: number of tokens that are told apart; None: all that are known.
            layers: numbers of layers whose hidden states are compared.
        """
        ...


class ModelTeacher:
    """The dense model itself, run on the same batches; hidden states become logits by chunks.

    Args:
        model: the dense model. It is moved, converted and frozen in place, and stays in eval mode.
        device: where it runs; None: where it is.
        dtype: type of its parameters, such as torch.bfloat16; None: as they are.
        processor: its processor or tokenizer; None: the one beside its weights.

    Raises:
        UnsupportedModelError: weights are offloaded, or the model has no language head.
    """

    def __init__(
        self,
        model: nn.Module,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        processor: Any = None,
    ):
        check_loaded(model)
        self.vocabulary = Vocabulary.of(model, processor)
        if device is not None or dtype is not None:
            model.to(device=device, dtype=dtype)
        self.model = model.eval().requires_grad_(False)
        self.layers = len(tower_layers(model, "language"))
        self.identity = {"model": model_digest(model, ())}
        self._head: OutputHead | None = None

    def check(self, *, temperature: float, positions: Positions, top_k: int | None) -> None:
        """A model gives targets of any settings."""

    @torch.no_grad()
    def targets(
        self,
        batch: Batch,
        places: Places,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        layers: Sequence[int] = (),
    ) -> "ModelTargets":
        """See `Teacher.targets`. One forward pass, without logits.

        Raises:
            UnsupportedModelError: the model's logits cannot be computed from its hidden states.
        """
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        own = {k: v.to(dtype) if _is_float(v) else v for k, v in batch.items()}
        with own_precision(self.model):
            if self._head is None:
                self._head = fit_head(self.model, own, places)
            with recorded(self.model, {n: n for n in layers}, places) as states:
                hidden = places.of(whole_pass(self.model, own))
        return ModelTargets(
            model=self.model,
            head=self._head,
            hidden=hidden,
            states=states,
            temperature=temperature,
            top_k=top_k,
        )


@dataclass(frozen=True, kw_only=True)
class ModelTargets:
    """The last hidden states of a teacher at the places, and how they become distributions.

    Attributes:
        model, head: the teacher and its head.
        hidden: its last hidden states (positions, width).
        states: see `Targets`.
        temperature, top_k: see `Teacher.targets`.
    """

    model: nn.Module
    head: OutputHead
    hidden: Float[Tensor, "positions width"]
    temperature: float
    top_k: int | None
    states: Mapping[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def distribution(self, part: slice, device: torch.device) -> Distribution:
        """See `Targets.distribution`."""
        with own_precision(self.model):
            logits = self.head(self.model, self.hidden[part])
        log_p = (logits / self.temperature).log_softmax(-1)
        # Only what is compared travels between devices.
        found = None if self.top_k is None else TopK.of(log_p, self.top_k)
        if found is None:
            return Full(log_p=log_p.to(device))
        return TopK(**{name: value.to(device) for name, value in vars(found).items()})


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model within peft's wrapper, its adapters included; else `model`."""
    inside = getattr(model, "get_base_model", None)
    return model if inside is None else inside()


def fit_head(model: nn.Module, batch: Batch, places: Places) -> OutputHead:
    """The head of a model, compared with its own logits at the last places of the batch.

    Raises:
        UnsupportedModelError: it cannot be reproduced.
    """
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        raise UnsupportedModelError(f"{type(model).__name__} has no output embeddings.")
    # Models are asked for their logits from a column on: the last columns are few.
    chosen = places.columns.sort(descending=True, stable=True).indices[:HEAD_POSITIONS]
    with own_precision(model), evaluating(model):
        return fit_output_head(model, batch, places.columns[chosen], places.rows[chosen])[0]


@contextlib.contextmanager
def own_precision(model: nn.Module) -> Iterator[None]:
    """Inside the block the model runs in the type of its own parameters, whatever autocast is on.

    A model with parameters of several types runs under autocast to the least precise one.
    """
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    least = max(types, key=lambda dtype: torch.finfo(dtype).eps)
    device, mixed = next(model.parameters()).device.type, len(types) > 1
    with torch.autocast(device, dtype=least if mixed else None, enabled=mixed):
        yield


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
