"""A text -> rows of tokens to calibrate on, drawn by a seed, and fixed rows to test on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hipp_ext.calibration import Calibration
from hipp_ext.errors import DataError

TEST_BATCH = 4  # rows; the logits of one take 50 MB of SmolLM2's vocabulary


@dataclass(frozen=True, kw_only=True)
class TextSize:
    """Rows and tokens of a row, for calibration and for the test."""

    rows: int = 32
    length: int = 128
    test_rows: int = 24
    test_length: int = 256

    @property
    def tokens(self) -> int:
        """Tokens of one calibration."""
        return self.rows * self.length


def read_text(path: Path | None) -> str:
    """The text of a file, or of Python's own help topics, each paragraph once.

    Help topics quote each other: without repeated paragraphs nothing of the test is in a
    calibration.

    Raises:
        DataError: the file cannot be read as UTF-8.
    """
    if path is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--text {path}: a file of UTF-8 text is needed ({error}).") from None
    return "\n\n".join(dict.fromkeys(part.strip("\n") for part in text.split("\n\n")))


class Corpus:
    """Tokens of a text, cut into blocks of `size.test_length`.

    Blocks at even distances are the test; calibrations are drawn from the others.

    Args:
        text: at least about three times as much as the test and one calibration take.
        tokenizer: the model's own.
        size: rows and lengths.
        test_text: another text, whose blocks at even distances are the test instead.

    Raises:
        DataError: a text is too short.
    """

    def __init__(self, text: str, tokenizer: Any, size: TextSize, test_text: str | None = None):
        self.size = size
        texts = [text] if test_text is None else [text, test_text]
        self.digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        blocks = _blocks(text, tokenizer, size)
        tested = blocks if test_text is None else _blocks(test_text, tokenizer, size)
        chosen = torch.zeros(len(tested), dtype=torch.bool)
        chosen[(torch.arange(size.test_rows) * len(tested)) // size.test_rows] = True
        self.test: Int[Tensor, "rows tokens"] = tested[chosen]
        rest = blocks[~chosen] if test_text is None else blocks
        each = size.test_length // size.length  # calibration rows in a block
        self.rest: Int[Tensor, "rows tokens"] = rest[:, : each * size.length].reshape(
            -1, size.length
        )
        if len(self.rest) < size.rows:
            raise DataError(
                f"The text leaves {len(self.rest)} rows of {size.length} tokens to calibrate on; "
                f"{size.rows} are needed."
            )

    def calibration(self, seed: int, batch_size: int = 8) -> Calibration:
        """`size.rows` rows that are not of the test, in the order in which `seed` draws them."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(self.rest), generator=generator)[: self.size.rows]
        return Calibration.from_batches(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            for ids in self.rest[drawn].split(batch_size)
        )


def _blocks(text: str, tokenizer: Any, size: TextSize) -> Int[Tensor, "blocks tokens"]:
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    ids, length = torch.tensor(encoded["input_ids"], dtype=torch.long), size.test_length
    if len(ids) < 2 * size.test_rows * length:
        raise DataError(
            f"The text has {len(ids)} tokens: too few for {size.test_rows} test rows of {length} "
            "tokens, and as many others between them."
        )
    return ids[: len(ids) // length * length].view(-1, length)


@torch.no_grad()
def row_losses(model: nn.Module, rows: Int[Tensor, "rows tokens"]) -> Float[Tensor, " rows"]:
    """Mean negative log-likelihood of each row's tokens but the first [nats per token], float64."""
    losses = [losses_of(next_logits(model, ids), ids) for ids in rows.split(TEST_BATCH)]
    return torch.cat(losses).double()


def next_logits(model: nn.Module, ids: Int[Tensor, "rows tokens"]) -> Tensor:
    """What the model says of every token but the first: logits, (rows, tokens - 1, vocabulary)."""
    return model(input_ids=ids, use_cache=False).logits[:, :-1]


def losses_of(logits: Tensor, ids: Int[Tensor, "rows tokens"]) -> Float[Tensor, " rows"]:
    """Mean negative log-likelihood of each row's tokens but the first [nats per token].

    Args:
        logits: those of `next_logits`.
        ids: the rows.
    """
    each = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return each.mean(1)


def perplexity(losses: Sequence[float]) -> float:
    """exp of the mean loss of rows of equal length; infinite where that overflows."""
    return float(torch.tensor(losses, dtype=torch.float64).mean().exp())
