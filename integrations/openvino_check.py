"""Graphs against the models that they were made of, in float32 on the CPU."""

from typing import Any

import torch
from torch import Tensor, nn

from hipp_ext.errors import UnsupportedModelError
from hipp_ext.integrations.openvino_host import load

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
TOLERANCE = 1e-3  # more than another order of summation makes, less than a wrong graph does
STEPS = ((0, 6), (6, 7), (7, 8))  # first and last token of a prefill and two steps of decoding


@torch.no_grad()
def check_decoder(graph: Any, model: Any) -> None:
    """Raise UnsupportedModelError unless `graph` gives the log probabilities of `model`.

    `graph` goes token by token with its state, `model` over the whole text at once.
    """
    last = STEPS[-1][1]
    embedding = model.get_input_embeddings()
    ids = (torch.arange(2 * last) * 7919 % embedding.num_embeddings).reshape(2, last)
    inputs = embedding(ids) if "inputs_embeds" in graph.inputs[0].names else ids
    request = load().compile_model(graph, "CPU", EXACT).create_infer_request()
    logits = [_step(request, inputs, start, stop) for start, stop in STEPS]
    whole = model.get_decoder()(
        inputs_embeds=embedding(ids), attention_mask=torch.ones_like(ids), use_cache=False
    ).last_hidden_state
    wanted = model.get_output_embeddings()(whole).log_softmax(-1)
    found = torch.cat(logits, 1).log_softmax(-1)
    _judge("language model", (found - wanted).abs().max().item())


@torch.no_grad()
def check_module(graph: Any, module: nn.Module, example: Tensor, name: str) -> None:
    """Raise UnsupportedModelError unless `graph` gives what `module` gives for `example`."""
    found = torch.from_numpy(load().compile_model(graph, "CPU", EXACT)([example.numpy()])[0])
    wanted = module(example)
    _judge(name, ((found - wanted).abs().max() / wanted.abs().max()).item())


def _step(request: Any, inputs: Tensor, start: int, stop: int) -> Tensor:
    """The logits of tokens `start` to `stop`, which follow those that were given before."""
    rows = len(inputs)
    feed = {
        0: inputs[:, start:stop].numpy(),
        "attention_mask": torch.ones(rows, stop, dtype=torch.long).numpy(),
        "position_ids": torch.arange(start, stop).repeat(rows, 1).numpy(),
        "beam_idx": torch.arange(rows, dtype=torch.int32).numpy(),
    }
    return torch.from_numpy(request.infer(feed)["logits"].copy())


def _judge(name: str, difference: float) -> None:
    if not difference <= TOLERANCE:  # also where it is no number
        raise UnsupportedModelError(
            f"The OpenVINO graph of the {name} differs from the model by {difference:.2g}, more "
            f"than {TOLERANCE}: nothing was written. Please report it with the versions of torch, "
            "transformers and openvino."
        )
