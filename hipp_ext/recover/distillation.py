"""Learning from the dense model: the divergence of what both say, and of their hidden states."""

import contextlib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hipp_ext.calibration import Batch
from hipp_ext.errors import CalibrationError, HippError, UnsupportedModelError
from hipp_ext.output_head import OutputHead, logit_bytes
from hipp_ext.quantities import finite_option, whole_option
from hipp_ext.recover.counts import WHOLE, Counts
from hipp_ext.recover.divergence import chunked_sum
from hipp_ext.recover.layers import hidden_distance, layers_in_student, recorded
from hipp_ext.recover.places import Places, Positions, check_positions, find_places
from hipp_ext.recover.teachers import Targets, Teacher, fit_head, unwrapped
from hipp_ext.recover.vocabulary import Vocabulary
from hipp_ext.replay import whole_pass

LOGIT_BYTES = 1 << 27  # float32 logits of the student that are in memory at once


@dataclass(frozen=True)
class Distillation:
    """KL divergence from the dense model to the pruned one, token by token.

    With T the temperature, p and q the softmax of the teacher's and of the student's logits divided
    by T, c and h the shares of cross-entropy and hidden states:

        loss = (1 - c - h) T^2 KL(p || q) + c cross-entropy + h hidden

    KL is the mean over the counted positions, cross-entropy (at temperature 1) the mean over those
    of them that predict a label, hidden the distance of `hidden_distance`, batch by batch. Logits
    are computed chunk by chunk, and so are their gradients: at most `memory_limit` of the student's
    are in memory at once, with about ten tensors of that size beside them. They are computed by the
    model's own output embeddings, in whatever precision autocast asks for. Only the first batch
    needs more: how both models make their logits is measured at up to 64 positions.

    Attributes:
        teacher: the dense model (`ModelTeacher`), or what it said once (`CachedTeacher`).
        temperature: T, above 0. The factor T^2 keeps the size of the gradients.
        positions: "answers": positions that predict a label; "text": those that predict any token
            but one that stands for a picture.
        top_k: compare the teacher's k most likely tokens, and all others as one (`TopK`); None: the
            whole vocabulary, or all that the teacher keeps.
        cross_entropy_share: c, from 0 to 1.
        hidden_share: h, from 0 to 1 - c.
        hidden_layers: numbers of layers of the dense model whose outputs are compared where
            h > 0; None: all of them. A dropped layer is compared at the last one left below it.
        memory_limit: size of the student's float32 logits that are in memory at once [bytes]; those
            of one position may have more.

    Raises:
        HippError: a setting is out of range.
        UnsupportedModelError: hidden states are asked of a teacher that has none.

    Source: Hinton et al. (arXiv 1503.02531, section 2); for pruned language models Minitron (arXiv
    2407.14679, section 3; 2408.11796), which found the forward KL alone, without cross-entropy, to
    be best after pruning in width.
    Differs from the papers: shares add up to 1; Minitron balances losses by their size at every
    step. The top-k divergence has a bucket for all other tokens; see `TopK`.
    """

    teacher: Teacher
    temperature: float = field(default=1.0, kw_only=True)
    positions: Positions = field(default="answers", kw_only=True)
    top_k: int | None = field(default=None, kw_only=True)
    cross_entropy_share: float = field(default=0.0, kw_only=True)
    hidden_share: float = field(default=0.0, kw_only=True)
    hidden_layers: Sequence[int] | None = field(default=None, kw_only=True)
    memory_limit: int = field(default=LOGIT_BYTES, kw_only=True)
    _heads: weakref.WeakKeyDictionary[nn.Module, OutputHead] = field(
        default_factory=weakref.WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_positions(self.positions)
        temperature = finite_option("temperature", self.temperature, HippError)
        object.__setattr__(self, "temperature", temperature)
        whole_option("memory_limit", self.memory_limit, HippError, 1)
        if self.top_k is not None:
            whole_option("top_k", self.top_k, HippError, 1)
        self.teacher.check(temperature=self.temperature, positions=self.positions, top_k=self.top_k)
        shares = {name: getattr(self, name) for name in ("cross_entropy_share", "hidden_share")}
        total = sum(finite_option(n, v, HippError, zero=True) for n, v in shares.items())
        if total > 1:
            raise HippError(f"{shares}: the shares add up to {total:g}; 1 is the most.")
        if self.hidden_share and not self.teacher.layers:
            raise UnsupportedModelError(
                f"hidden_share={self.hidden_share:g}: {type(self.teacher).__name__} keeps no "
                "hidden states. Give the dense model itself as the teacher."
            )

    @property
    def identity(self) -> dict[str, Any]:
        """See `Objective`: the settings, and the identity of the teacher."""
        layers = None if self.hidden_layers is None else list(self.hidden_layers)
        return {
            "name": type(self).__name__,
            "teacher": dict(self.teacher.identity),
            "temperature": self.temperature,
            "positions": self.positions,
            "top_k": self.top_k,
            "cross_entropy_share": self.cross_entropy_share,
            "hidden_share": self.hidden_share,
            "hidden_layers": layers,
        }

    def prepare(self, model: nn.Module, batch: Batch) -> None:
        """See `Objective.prepare`: compare the vocabularies, and find how `model` makes its logits.

        Raises:
            CheckpointError: teacher and student have different vocabularies.
            UnsupportedModelError: the logits cannot be computed from the last hidden states.
            PlanError: hidden_layers does not fit the model.
        """
        student = unwrapped(model)
        if student in self._heads:
            return
        self.teacher.vocabulary.check_same(Vocabulary.of(student))
        self._layers(student)
        self._heads[student] = fit_head(student, batch, self._places(batch))

    def counts(self, batch: Batch) -> Counts:
        """See `Objective.counts`.

        Raises:
            CalibrationError: no position counts.
        """
        places = self._places(batch)
        return Counts(len(places), int(places.answered.sum()))

    def losses(self, model: nn.Module, batch: Batch, weights: Counts = WHOLE) -> dict[str, Tensor]:
        """See `Objective.losses`: "loss", "kl" (without T^2), "cross_entropy" where a position has
        a label, and "hidden" where it has a share.

        Args:
            model: the student: a transformers model, or one that peft has wrapped. Within
                DistributedDataParallel this is called in the forward pass of the wrapped module.
            batch: inputs of the model's forward, on any device; labels where they are needed.
            weights: factors of the parts of "loss".

        Raises:
            CalibrationError: no position counts, or none has a label and cross-entropy has a share.
            CheckpointError, UnsupportedModelError, PlanError: as `prepare`, which the first call
                does.
        """
        self.prepare(model, batch)
        student = unwrapped(model)
        places = self._places(batch)
        if self.cross_entropy_share and not bool(places.answered.any()):
            raise CalibrationError(
                f"cross_entropy_share={self.cross_entropy_share:g}: no position of the batch has a "
                "label."
            )
        layers = self._layers(student)
        targets = self.teacher.targets(
            batch, places, temperature=self.temperature, top_k=self.top_k, layers=tuple(layers)
        )
        with recorded(student, layers, places) if layers else contextlib.nullcontext({}) as states:
            hidden = places.of(whole_pass(student, batch))
        loss, (kl, cross_entropy) = self._compared(student, hidden, places, targets, weights)
        report = {"kl": kl}
        if bool(places.answered.any()):
            report["cross_entropy"] = cross_entropy
        if layers:
            distance = hidden_distance(states, targets.states)
            loss = loss + weights.learnt * self.hidden_share * distance.to(loss)
            report["hidden"] = distance.detach()
        return {"loss": loss, **report}

    def total(self, losses: Mapping[str, float]) -> float:
        """See `Objective.total`."""
        shares = {
            "kl": self._share_of_kl,
            "cross_entropy": self.cross_entropy_share,
            "hidden": self.hidden_share,
        }
        return sum(share * losses[name] for name, share in shares.items() if share)

    @property
    def _share_of_kl(self) -> float:
        return (1 - self.cross_entropy_share - self.hidden_share) * self.temperature**2

    def _places(self, batch: Batch) -> Places:
        return find_places(batch, self.positions, self.teacher.vocabulary.image_token)

    def _layers(self, student: nn.Module) -> dict[int, int]:
        if not self.hidden_share:
            return {}
        dense = self.teacher.layers
        chosen = range(dense) if self.hidden_layers is None else self.hidden_layers
        return layers_in_student(student, chosen, dense)

    def _compared(
        self, student: nn.Module, hidden: Tensor, places: Places, targets: Targets, weights: Counts
    ) -> tuple[Tensor, Tensor]:
        """(loss without hidden states, (KL, cross-entropy) without gradients)."""
        head, embeddings = self._heads[student], student.get_output_embeddings()  # type: ignore
        names, parameters = zip(*embeddings.named_parameters(), strict=True)
        answers = max(1, int(places.answered.sum()))
        of_kl = weights.learnt * self._share_of_kl
        of_surprise = weights.answered * self.cross_entropy_share

        def terms(part: slice, some: Tensor, *values: Tensor) -> Tensor:
            own = dict(zip(names, values, strict=True))
            logits = head.of(functional_call(embeddings, own, some).float())
            scaled = logits / self.temperature
            kl = targets.distribution(part, logits.device).kl(scaled).sum() / len(places)
            ids = places.next_ids[part].masked_fill(~places.answered[part], -100)
            surprise = nn.functional.cross_entropy(logits, ids.to(logits.device), reduction="sum")
            surprise = surprise / answers
            return torch.stack([of_kl * kl + of_surprise * surprise, kl, surprise])

        chunk = max(1, self.memory_limit // logit_bytes(student))
        return chunked_sum(terms, hidden, parameters, chunk)
