"""`hipp perplexity`: the user's own rows under several models, and what the models write.

Perplexity measures one token at a time, with all tokens before it given. A pruned model whose
perplexity looks well may still repeat itself when it writes, so each model also answers some rows,
and the share of repeated 4-grams is measured.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from hipp_ext.calibration import Batch, Calibration, find_processor
from hipp_ext.calibration.encoding import padding_id
from hipp_ext.errors import DataError
from hipp_ext.evals.generation import place
from hipp_ext.evals.hipp_vlm import plain_greedy
from hipp_ext.evals.measuring import describe
from hipp_ext.evals.statistics import bootstrap_estimate
from hipp_ext.evals.text_table import parameters_text, text_table
from hipp_ext.files.untrusted import short_name, shown
from hipp_ext.likelihood import AnswerLikelihood
from hipp_ext.progress import progress_bar
from hipp_ext.surgery.checkpoint import load_pruned, resolve_device

if TYPE_CHECKING:
    from rich.table import Table

BEGINNING = 32  # tokens of a text that a model goes on from
NGRAM = 4
REPEATS, TIMES = 20.0, 2.0  # a model repeats itself from so many percent, and times the first
LARGEST = math.log(sys.float_info.max)
COLUMNS = ("model", "parameters", "perplexity", "times the first", "repeated [%]")


def run(
    models: Mapping[str, str | Path],
    data: str | Path,
    *,
    image_folder: str | Path | None = None,
    rows: int | None = None,
    sequence_length: int | None = None,
    answers: int = 4,
    max_new_tokens: int = 64,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = False,
    command: str = "hipp perplexity",
) -> dict[str, Any]:
    """Perplexity of the answers in the user's rows, and greedy answers, of model folders.

    Models are loaded one after the other. Perplexity is the exponential of the mean of -log p over
    all tokens of all answers; of a plain text every token counts. Intervals come from a bootstrap
    over rows, which for the ratio draws the same rows for both models.

    Args:
        models: name to model folder; the others are compared with the first.
        data, image_folder, rows, sequence_length: see `Calibration.from_file`.
        answers: number of rows that every model answers greedily, evenly spaced; 0: none.
        max_new_tokens: most tokens of an answer.
        device: torch device; None: the GPU if there is one.
        dtype: name of a torch dtype; None: as stored.
        progress: report progress on stderr.
        command: the command line that is recorded in the result.

    Returns:
        data, rows, tokens, prompts (ends of what was answered), and for each of models: parameters,
        perplexity {value, low, high} (lower is better), for all but the first also times_first
        {value, low, high}, written (texts), repeated: the share of 4-grams in them that stand
        earlier in the same text [%], None where there are none (as seq-rep-4 of Welleck et al.,
        arXiv 1908.04319). Intervals are 95%; None for a single row.

    Raises:
        CalibrationError, DataError: the file cannot be used, a model has no processor, or the
            processors make other tokens of it.
        CheckpointError: a folder is no model.
    """
    device, stored_as = resolve_device(device), getattr(torch, dtype) if dtype else None
    options: dict[str, Any] = {"image_folder": image_folder, "sequence_length": sequence_length}
    found: dict[str, dict[str, Any]] = {}
    losses: dict[str, np.ndarray] = {}
    digest, counts, prompts = "", np.zeros(0), list[str]()
    with progress_bar(progress, "models", len(models)) as update:
        for name, folder in models.items():
            update(len(found), name)
            model = load_pruned(folder, device=device, dtype=stored_as).eval()
            processor = find_processor(model)
            if processor is None:
                raise DataError(f"{folder} has no processor or tokenizer that could read {data}.")
            calibration = Calibration.from_file(data, processor, rows=rows, **options)
            if calibration.digest != (digest := digest or calibration.digest):
                raise DataError(
                    f"The processor of {name} makes other tokens of {data} than that of "
                    f"{next(iter(models))}, so their perplexities per token cannot be compared."
                )
            losses[name], counts = answer_losses(model, calibration.batches)
            found[name] = {"parameters": sum(p.numel() for p in model.parameters())}
            if answers:
                asked = Calibration.from_file(
                    data, processor, rows=answers, batch_size=1, **options
                ).batches
                prompts, found[name]["written"] = write(model, processor, asked, max_new_tokens)
                found[name]["repeated"] = repeated(found[name]["written"])
            del model
    first = losses[next(iter(models))]
    for name, own in losses.items():
        found[name]["perplexity"] = _exponential(own, counts)
        if own is not first:
            found[name]["times_first"] = _exponential(own - first, counts)
    values = {"data": str(data), "rows": len(counts), "tokens": int(counts.sum())}
    return describe(command, values | {"prompts": prompts, "models": found}, device)


def answer_losses(model: nn.Module, batches: Sequence[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """(sum of -log p over the answer [nats], number of its tokens) of every row."""
    likelihood = AnswerLikelihood(model, batches, whole=True)
    counts = likelihood.tokens.numpy().astype(float)
    return -likelihood(model).double().numpy() * counts, counts


@torch.no_grad()
def write(
    model: Any, processor: Any, rows: Sequence[Batch], max_new_tokens: int
) -> tuple[list[str], list[str]]:
    """(the prompts, what the model writes greedily) for rows with answers, each in a batch.

    A text is cut after its first BEGINNING tokens.
    """
    prompts, written = [], []
    tokenizer = getattr(processor, "tokenizer", processor)
    for row in rows:
        prompt = place(_prompt(row), model)
        out = model.generate(
            **prompt,
            generation_config=plain_greedy(model),
            max_new_tokens=max_new_tokens,
            pad_token_id=padding_id(tokenizer),
        )
        length = prompt["input_ids"].shape[1]
        ends = [prompt["input_ids"][0], out[0, length:]]
        texts = [tokenizer.decode(own, skip_special_tokens=True).strip() for own in ends]
        prompts.append(texts[0])
        written.append(texts[1])
    return prompts, written


def _prompt(row: Batch) -> dict[str, torch.Tensor]:
    """A batch of one row without padding, labels, and all that follows the prompt."""
    ids = row["input_ids"]
    answered = (row["labels"][0] != -100).nonzero()[:, 0]
    end = int(answered[0])
    begin = int(row["attention_mask"][0].nonzero()[0]) if "attention_mask" in row else 0
    if end <= begin + 1:  # a text
        end = min(begin + BEGINNING, ids.shape[1] - 1)
    return {
        name: value[:, begin:end] if value.shape[:2] == ids.shape else value
        for name, value in row.items()
        if name != "labels" and isinstance(value, torch.Tensor)
    }


def repeated(texts: Sequence[str]) -> float | None:
    """Share of the 4-grams of words that stand earlier in the same text [%]; None: no 4-grams."""
    total = distinct = 0
    for text in texts:
        words = text.split()
        grams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
        total += len(grams)
        distinct += len(set(grams))
    return 100 * (1 - distinct / total) if total else None


def repeating(result: Mapping[str, Any]) -> list[str]:
    """The models that repeat themselves, which the first one does less."""
    shares = {name: own.get("repeated") or 0.0 for name, own in result["models"].items()}
    first = next(iter(shares.values()))
    return [n for n, own in shares.items() if own >= REPEATS and own > TIMES * first]


def perplexity_table(result: Mapping[str, Any]) -> "Table":
    """A line for every model of what `run` returns."""
    title = f"{result['rows']} rows, {result['tokens']:,} tokens of answers (95% intervals)"
    rows = [
        [
            short_name(name),
            parameters_text(own["parameters"]),
            _number(own["perplexity"]["value"], 2),
            _with_interval(own["times_first"]) if "times_first" in own else "",
            "" if own.get("repeated") is None else f"{own['repeated']:.0f}",
        ]
        for name, own in result["models"].items()
    ]
    return text_table(COLUMNS, rows, title=title)


def answer_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The end of each prompt, and what every model wrote."""
    for number, prompt in enumerate(result["prompts"]):
        yield f"... {shown(' '.join(prompt.split())[-120:])}"
        for name, own in result["models"].items():
            yield f"  {short_name(name)}: {shown(' '.join(own['written'][number].split()), 400)}"


def _exponential(losses: np.ndarray, counts: np.ndarray) -> dict[str, float | None]:
    """exp(sum of losses / number of tokens), with its interval over rows."""
    estimate = bootstrap_estimate(
        np.stack([losses, counts], axis=1),
        [str(row) for row in range(len(counts))],
        lambda sums: sums[..., 0] / sums[..., 1],
    )
    values = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: math.exp(own) if own < LARGEST else None for name, own in values.items()}


def _with_interval(value: Mapping[str, float | None]) -> str:
    texts = [_number(own, 3) for own in value.values()]
    return texts[0] if value["low"] is None else f"{texts[0]} ({texts[1]} to {texts[2]})"


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "too large"
    return f"{value:.{digits}f}" if value < 1e4 else f"{value:.2e}"
