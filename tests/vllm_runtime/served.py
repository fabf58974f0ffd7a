"""Greedy answers of a model folder, by vLLM and by transformers."""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

TOKENS = 6  # of an answer


class Answer(NamedTuple):
    """Token ids, and their log probabilities [nats]."""

    tokens: list[int]
    logprobs: list[float]


@contextlib.contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """vLLM with the model of a folder, in this process, on the CPU."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = dict(dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8)
    try:
        llm = LLM(str(folder), **settings | options)
        yield llm
        del llm
    finally:
        cleanup_dist_env_and_memory()
        gc.collect()


def by_vllm(folder: Path, prompts: list[Any], **options: Any) -> list[Answer]:
    """Answers of vLLM. A prompt is a list of token ids, or (text, picture)."""
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0, max_tokens=TOKENS, logprobs=0, ignore_eos=True, detokenize=False
    )
    with engine(folder, skip_tokenizer_init=isinstance(prompts[0], list), **options) as llm:
        outputs = llm.generate([_vllm_prompt(p) for p in prompts], greedy, use_tqdm=False)
    return [_answer(output.outputs[0]) for output in outputs]


def _vllm_prompt(prompt: Any) -> dict[str, Any]:
    if isinstance(prompt, list):
        return {"prompt_token_ids": prompt}
    text, picture = prompt
    return {"prompt": text, "multi_modal_data": {"image": picture}}


def _answer(output: Any) -> Answer:
    tokens = list(output.token_ids)
    return Answer(tokens, [p[t].logprob for t, p in zip(tokens, output.logprobs, strict=True)])


@torch.no_grad()
def by_transformers(model: Any, prompts: list[Any], processor: Any = None) -> list[Answer]:
    """Answers of `model`, prompt by prompt."""
    model.generation_config.eos_token_id = None  # ends no answer, as with vLLM's ignore_eos
    return [_generated(model, _inputs(p, processor)) for p in prompts]


def _inputs(prompt: Any, processor: Any) -> dict[str, Any]:
    if isinstance(prompt, list):
        ids = torch.tensor([prompt])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    text, picture = prompt
    inputs = processor(text=text, images=[picture], return_tensors="pt", add_special_tokens=True)
    if "token_type_ids" in inputs:
        # Gemma 3 attends to all tokens of a picture; vLLM on CPUs, to those before alone, whether
        # the model was pruned or not.
        inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
    return inputs


def _generated(model: Any, inputs: dict[str, Any]) -> Answer:
    out = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, -TOKENS:].tolist()
    logprobs = [row[0].log_softmax(-1)[t].item() for row, t in zip(out.logits, tokens, strict=True)]
    return Answer(tokens, logprobs)


def differences(ours: list[Answer], theirs: list[Answer]) -> list[float]:
    """Of log probabilities, token by token [nats]; the tokens must be the same."""
    assert [a.tokens for a in ours] == [a.tokens for a in theirs]
    return [
        abs(x - y)
        for a, b in zip(ours, theirs, strict=True)
        for x, y in zip(a.logprobs, b.logprobs, strict=True)
    ]


def largest_difference(ours: list[Answer], theirs: list[Answer]) -> float:
    """The largest of `differences`."""
    return max(differences(ours, theirs))
