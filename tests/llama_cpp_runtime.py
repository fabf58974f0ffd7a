"""Tiny models with a tokenizer, and llama.cpp itself, in this process, to run their GGUF files."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from hipp_ext import save_pruned

EOS = 2
_SPECIAL = ["<unk>", "<s>", "</s>", "<a>", "<b>", "<image>"]
_TEXT = "the cat sat on a mat and 12 dogs ran, as quick foxes jump over it. why? to be, or not"


def tiny_tokenizer(size: int | None = None) -> PreTrainedTokenizerFast:
    """A unigram tokenizer for the tiny models: <unk>, <s> and </s> are their ids 0, 1 and 2.

    Its pieces are written down, since the trainer of such vocabularies draws ties anew every time.
    """
    words = dict.fromkeys(f"\N{LOWER ONE EIGHTH BLOCK}{word}" for word in _TEXT.split())
    parts = dict.fromkeys(word[:end] for word in words for end in (3, len(word)))
    letters = dict.fromkeys("".join(words))
    pieces = [*_SPECIAL, *dict.fromkeys([*letters, *parts])][:size]
    # A piece costs more than another of the same length if it comes later: no two ways tie.
    scored = [(piece, -3 / len(piece) - number / 64) for number, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0))
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def save(model: nn.Module, folder: Path) -> Path:
    """Write a tiny model and its tokenizer."""
    return save_pruned(model, folder, tiny_tokenizer())


def serve(path: Path, mmproj: Path | None = None) -> Any:
    """llama.cpp with a file, in full precision."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    if mmproj is not None:
        params.mmproj.path = str(mmproj)
        params.mmproj_use_gpu = False
    params.n_ctx, params.n_gpu_layers, params.warmup, params.verbosity = 256, 0, False, -1
    params.fit_params, params.ui = False, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.flash_attn_type = off
    return xllamacpp.Server(params)


def greedy(
    server: Any, prompt: Any, tokens: int = 8, banned: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """The likeliest continuation: per token its id, and ids and log probabilities of five.

    Without `banned` tokens, whose log probabilities are told all the same.
    """
    asked = {
        "prompt": prompt,
        "temperature": 0,
        "n_probs": 5,
        "n_predict": tokens,
        "ignore_eos": True,
        "cache_prompt": False,
        "logit_bias": [[token, False] for token in banned],
    }
    return ask(server, "completion", asked)["completion_probabilities"]


def ask(server: Any, path: str, body: Any = None) -> Any:
    """The answer of llama.cpp's server."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.listening_address}/{path}", data, headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request) as answer:
        return json.load(answer)


@torch.no_grad()
def largest_difference(
    model: nn.Module, path: Path, prompts: Sequence[list[int]], *, same: bool = True
) -> float:
    """Largest difference of log probabilities between llama.cpp and `model` [nats].

    The greedy tokens of every prompt must be the same, unless `same` is False. The end of a text
    is never taken.
    """
    server, worst = serve(path), 0.0
    for prompt in prompts:
        steps = greedy(server, prompt)
        ids = torch.tensor([[*prompt, *(step["id"] for step in steps)]])
        log_probs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        taken = [step["id"] for step in steps]
        assert not same or _likeliest(log_probs) == taken
        worst = max(worst, _compare(steps, log_probs))
    return worst


def _likeliest(log_probs: torch.Tensor) -> list[int]:
    allowed = log_probs.clone()
    allowed[:, EOS] = -torch.inf
    return allowed.argmax(-1).tolist()


def _compare(steps: Sequence[dict[str, Any]], log_probs: torch.Tensor) -> float:
    return max(
        abs(top["logprob"] - float(expected[top["id"]]))
        for step, expected in zip(steps, log_probs, strict=True)
        for top in step["top_logprobs"]
    )


def prompts(count: int = 20, vocabulary: int = 97) -> list[list[int]]:
    """Random prompts of different lengths."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(6, vocabulary, (3 + i % 7,), generator=generator).tolist()
        for i in range(count)
    ]
