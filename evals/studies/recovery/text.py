"""What SmolLM2 learns from: rows of Python's help topics and docstrings, apart from the test's."""

import ast
import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hipp_ext.errors import DataError
from hipp_ext.evals.studies.real_lm.text import Corpus, TextSize, read_text
from hipp_ext.evals.studies.smolworld import packages

LENGTH = 256  # tokens of a row, those of the test too
VALIDATION_ROWS = 16
SHARED_TOKENS = 13  # a row that has so many in a row with the test or the validation is left out
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages"}
GLOSS_STEP = 40  # every 40th gloss of WordNet's nouns makes enough rows
LEAST_DOCSTRING = 200  # characters; shorter ones are hardly prose

Rows = Int[Tensor, "rows tokens"]


class RecoveryText:
    """Rows of `LENGTH` tokens: `train`, `validation`, `test` and `other`.

    The test is that of the studies `real_lm` and `serving`: blocks of the help topics at even
    distances. Blocks of the others at even distances are the validation. `train` has the rest of
    the topics, and the docstrings of the standard library or a text of the user's own. A row that
    shares `SHARED_TOKENS` tokens in a row with the test or the validation is not in it. `other` is
    text of another kind, as many rows as the test has, which shows what a recovery forgets.

    Args:
        tokenizer: the model's own.
        path: file of UTF-8 text to train on instead of docstrings; None: docstrings.
        topics: text whose blocks are tested; None: Python's help topics.
        other: text of another kind; None: WordNet's glosses of nouns, where they are installed
            (`make smolworld`), else no rows.
        size: rows and lengths of calibration and test.

    Attributes:
        corpus: the text as the two other studies cut it; its `calibration` is for plans and
            reconstruction. Rows of it may be in the validation, never in the test.
        left_out: number of rows that shared tokens with the test or the validation.

    Raises:
        DataError: a text cannot be read, or is too short.
    """

    def __init__(
        self,
        tokenizer: Any,
        path: Path | None = None,
        topics: str | None = None,
        size: TextSize | None = None,
        other: str | None = None,
    ):
        self.size = size or TextSize()
        topics = read_text(None) if topics is None else topics
        self.corpus = Corpus(topics, tokenizer, self.size)
        length = self.size.test_length
        whole = TextSize(
            rows=VALIDATION_ROWS, length=length, test_rows=self.size.test_rows, test_length=length
        )
        others = Corpus(topics, tokenizer, whole).rest
        chosen = torch.zeros(len(others), dtype=torch.bool)
        chosen[torch.arange(VALIDATION_ROWS) * len(others) // VALIDATION_ROWS] = True
        self.test, self.validation = self.corpus.test, others[chosen]
        more = docstrings() if path is None else read_text(path)
        ids = tokenizer(more, add_special_tokens=False, verbose=False)["input_ids"]
        added = torch.tensor(ids[: len(ids) // length * length], dtype=torch.long)
        candidates = torch.cat([others[~chosen], added.view(-1, length)])
        known = set(_sequences([*self.test.tolist(), *self.validation.tolist()]))
        apart = [known.isdisjoint(_sequences([row])) for row in candidates.tolist()]
        self.train: Rows = candidates[torch.tensor(apart)]
        self.left_out = len(candidates) - len(self.train)
        other = glosses() if other is None else other
        self.other: Rows = Corpus(other, tokenizer, whole).test if other else self.test[:0]
        if not len(self.train):
            raise DataError("No row to train on is left beside the test: give a longer --text.")

    @property
    def digest(self) -> str:
        """SHA-256 of all rows."""
        parts = (self.train, self.validation, self.test, self.other)
        return hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest()


def glosses() -> str:
    """Glosses of WordNet, a line each; empty where WordNet is not installed."""
    if packages.wordnet_missing():
        return ""
    return "\n".join(packages.noun_glosses()[::GLOSS_STEP])


def docstrings() -> str:
    """The docstrings of the standard library's modules, classes and functions, each once."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), dict[str, None]()
    for file in sorted(root.rglob("*.py")):
        if not LEFT_OUT & set(file.relative_to(root).parts):
            found |= dict.fromkeys(_docstrings(file))
    return "\n\n".join(found)


def _docstrings(file: Path) -> list[str]:
    try:
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    except (SyntaxError, UnicodeDecodeError):  # templates and examples of other encodings
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    return [text for text in texts if len(text) >= LEAST_DOCSTRING]


def _sequences(rows: Iterable[list[int]]) -> Iterable[tuple[int, ...]]:
    """Every `SHARED_TOKENS` tokens in a row."""
    for row in rows:
        for first in range(len(row) - SHARED_TOKENS + 1):
            yield tuple(row[first : first + SHARED_TOKENS])
