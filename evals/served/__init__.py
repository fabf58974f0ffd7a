"""Answers of a model behind a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, ..."""

from hipp_ext.evals.served.rows import answer_each
from hipp_ext.evals.served.vlm import ServedVLM

__all__ = ["ServedVLM", "answer_each"]
