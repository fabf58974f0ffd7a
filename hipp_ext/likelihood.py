"""How likely a model finds reference answers, token by token, in one forward pass per batch.

The first token of an answer tells which candidate a model chooses; a caption or an open answer has
many tokens and no candidates. Its likelihood is a continuous measure of whether the model would
write it: a greedy decoder writes every answer whose tokens all have a probability above one half.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.errors import CalibrationError, UnsupportedModelError
from hipp_ext.groups import check_loaded, decoder
from hipp_ext.output_head import OutputHead, fit_output_head, logit_bytes, tolerance
from hipp_ext.replay import decoder_inputs, whole_pass
from hipp_ext.scorers.base import evaluating, valid_tokens

LOGIT_BYTES = 1 << 28  # float32 logits that are in memory at once
CHECKED = 256  # answer tokens of the first batch that are compared with the model's own logits


class AnswerLikelihood:
    """`likelihood(model)` returns the mean log-likelihood of each row's answer [nats per token].

    The answer of a row is its labels that are not -100. Each of its tokens is predicted from all
    tokens before it (teacher forcing), so a batch needs one forward pass whatever the length of its
    answers. Padding is not counted, nor a label in the first column, which nothing predicts. For a
    single row the result is -model(**row).loss.

    The inputs of the language tower (vision tower, projector and embeddings) are computed once and
    kept on the device of the embeddings: for LLaVA-1.5-7B in bfloat16 about 5 MB a row. Logits are
    computed only where an answer is, at most `memory_limit` of them at once, on the device of the
    head.

    Args:
        model: the model, which is run once on `batches`. Later calls may prune, mask or slice its
            language tower only, unless `whole` is set.
        batches: inputs of the model's forward, with labels in every row.
        memory_limit: size of the float32 logits that are in memory at once [bytes]; the logits of
            one token may have more. Some copies of them are made.
        whole: later calls may also change what comes before the language tower: vision tower and
            projector run at every call, and the batches are kept instead.

    On the first batch up to CHECKED tokens are compared with the model's own logits.

    Raises:
        CalibrationError: a row has no label that counts.
        UnsupportedModelError: weights are offloaded, or the likelihoods differ from those of the
            model's own logits.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        *,
        memory_limit: int = LOGIT_BYTES,
        whole: bool = False,
    ):
        check_loaded(model)
        self._chunk = max(1, memory_limit // logit_bytes(model))
        self._head = OutputHead()
        self._batches: list[tuple[dict[str, Any], _Tokens]] = []
        self._run = whole_pass if whole else _replayed
        with torch.no_grad(), evaluating(model):
            for number, batch in enumerate(batches):
                inputs = batch if whole else decoder_inputs(model, batch)
                tokens = _answer_tokens(batch, number)
                if number == 0:
                    self._check(model, batch, inputs, tokens)
                self._batches.append((inputs, tokens))

    @property
    def tokens(self) -> Int[Tensor, " rows"]:
        """Number of tokens of each row's answer that count, in the order of the rows."""
        return torch.cat([torch.bincount(tokens.rows) for _, tokens in self._batches])

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Float[Tensor, " rows"]:
        """Mean log-likelihood of each row's answer [nats per token], float32, on the CPU, in the
        order of the rows; 0 is certain, and lower is less likely.
        """
        with evaluating(model):
            means = [
                tokens.row_means(self._log_p(model, inputs, tokens))
                for inputs, tokens in self._batches
            ]
        return torch.cat(means)

    def _log_p(
        self, model: nn.Module, inputs: dict[str, Any], tokens: "_Tokens"
    ) -> Float[Tensor, " tokens"]:
        """Log-likelihood of each token [nats], on the CPU."""
        hidden = self._run(model, inputs)
        hidden = hidden[tokens.rows.to(hidden.device), tokens.columns.to(hidden.device)]
        found = []
        for some, ids in zip(hidden.split(self._chunk), tokens.ids.split(self._chunk), strict=True):
            logits = self._head(model, some)
            ids = ids.to(logits.device)
            found.append(-nn.functional.cross_entropy(logits, ids, reduction="none").cpu())
        return torch.cat(found)

    def _check(
        self, model: nn.Module, batch: Batch, inputs: dict[str, Any], tokens: "_Tokens"
    ) -> None:
        """Find the model's head; raise if a replay gives other likelihoods than the model."""
        some = tokens.last_columns(CHECKED)
        self._head, logits = fit_output_head(model, batch, some.columns, some.rows)
        expected = -nn.functional.cross_entropy(logits, some.ids, reduction="none")
        error = float((self._log_p(model, inputs, some) - expected).abs().max())
        # A log-likelihood changes by at most twice the largest change of the logits.
        if not error <= 2 * tolerance(model, logits, roundings=16):
            raise UnsupportedModelError(
                f"{type(model).__name__}: its language tower, called again with the same inputs, "
                f"gives likelihoods that differ from those of the model by {error:.3g} nats, so "
                "plans cannot be compared with it."
            )


def _replayed(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The last hidden states for inputs of the language tower."""
    return decoder(model)(**inputs).last_hidden_state


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """The answer tokens of a batch, row by row, on the CPU.

    Attributes:
        rows: row of each token.
        columns: column of the token before it, whose output predicts it.
        ids: the token.
    """

    rows: Int[Tensor, " tokens"]
    columns: Int[Tensor, " tokens"]
    ids: Int[Tensor, " tokens"]

    def row_means(self, values: Float[Tensor, " tokens"]) -> Float[Tensor, " rows"]:
        """The mean of each row's values."""
        counts = torch.bincount(self.rows)
        return torch.zeros(len(counts)).index_add(0, self.rows, values) / counts

    def last_columns(self, most: int) -> "_Tokens":
        """The tokens of the last columns that have any: `most` of them at most, but a whole column.

        Only logits of these columns have to be computed to compare them, since models can be asked
        for their logits from a column on.
        """
        columns = max(1, most // (int(self.rows.max()) + 1))
        last = self.columns > int(self.columns.max()) - columns
        return _Tokens(rows=self.rows[last], columns=self.columns[last], ids=self.ids[last])


def _answer_tokens(batch: Batch, number: int) -> _Tokens:
    if "labels" not in batch:
        raise CalibrationError(
            f"Batch {number} has no labels, only {sorted(batch)}: its answers are not known."
        )
    labels, valid = batch["labels"].cpu(), valid_tokens(batch).cpu()
    counted = (labels[:, 1:] != -100) & valid[:, 1:] & valid[:, :-1]
    if silent := (~counted.any(1)).nonzero()[:, 0].tolist():
        raise CalibrationError(
            f"Row {silent[0]} of batch {number} has no answer: all of its labels are -100, padding "
            "or in the first column."
        )
    rows, columns = counted.nonzero(as_tuple=True)
    return _Tokens(rows=rows, columns=columns, ids=labels[rows, columns + 1])
