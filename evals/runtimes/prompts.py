"""Random prompts for a model folder."""

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hipp_ext.evals.runtimes import Serving


def prompts(folder: str, serving: "Serving") -> Iterator[list[int]]:
    """A prompt for the warm-up, and one for every repeat: no two begin alike.

    Tokens are from the middle of the vocabulary, because its ends hold special ones.
    """
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    generator = random.Random(serving.seed)
    for _ in range(1 + serving.repeats):
        yield generator.choices(range(vocabulary // 8, vocabulary // 2), k=serving.tokens)
