"""Answers scored in one forward pass: the next-token distribution where the answer would start.

Everything before the language tower (vision tower, projector, embeddings) is computed once and
replayed, because a plan for the language tower does not change it. Examples that start with the
same images share this prefix: POPE asks six questions about one image, and LLaVA-1.5 spends 576 of
about 620 tokens on it.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hipp_ext.calibration import Batch, image_token_id
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import common_value
from hipp_ext.groups import check_loaded, decoder
from hipp_ext.output_head import OutputHead, fit_output_head, tolerance
from hipp_ext.replay import decoder_inputs, whole_pass
from hipp_ext.scorers.base import evaluating, valid_tokens

SIMPLE_INPUTS = {
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "cache_position",
}
MEMORY_LIMIT = 2 << 30  # bytes of the keys and values of prefixes, in all layers


class AnswerLogits:
    """`logits(model)` returns the logits of the token that would answer each example of `batches`.

    The answer starts at the first label, or after the last token in a batch without labels.

    The inputs of the language tower are kept between calls, shared prefixes once, on the device of
    the embeddings: 1.2 GB for 192 questions of POPE and of ScienceQA to LLaVA-1.5-7B in bfloat16,
    and twice as much while they are computed. A call needs up to `memory_limit` for keys and
    values, and the activations of one layer, which include the keys and values of its examples.

    Args:
        model: the model, which is run once on `batches`. Later calls may prune, mask or slice its
            language tower only, unless `whole` is set.
        batches: inputs of the model's forward.
        share: compute what examples share (everything up to their last image) once per call. The
            logits are the same up to rounding. Models whose decoder is not plainly causal are
            replayed batch by batch instead.
        memory_limit: size of the keys and values of shared prefixes [bytes]. If they need more,
            fewer prefixes run together, but at least one.
        whole: later calls may also change what comes before the language tower: vision tower and
            projector run at every call, for every example, and the batches are kept instead.

    On the first batch the result is compared with `model(**batch).logits`.

    Raises:
        UnsupportedModelError: weights are offloaded, or the answers differ from the model's own
            logits.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        *,
        share: bool = True,
        memory_limit: int = MEMORY_LIMIT,
        whole: bool = False,
    ):
        examples: list[_Example] = []
        prefixes: dict[bytes, Tensor] = {}
        order: list[int] = []  # place of each of `examples` among all examples
        self._replayed: list[tuple[dict[str, Any], Tensor]] = []
        self._whole: list[tuple[Batch, Tensor]] = []
        replayed_order: list[int] = []
        n_seen = 0
        image_token = image_token_id(model)
        check_loaded(model)
        self._head = OutputHead()
        size = max((len(batch["input_ids"]) for batch in batches), default=1)
        self._limits = (size, memory_limit // _cache_bytes(model))
        with torch.no_grad(), evaluating(model):
            for number, batch in enumerate(batches):
                position = _answer_positions(batch)
                index = range(n_seen, n_seen + len(position))
                n_seen += len(position)
                if whole:
                    if number == 0:
                        self._head, _ = fit_output_head(model, batch, position)
                    self._whole.append((batch, position))
                    replayed_order += index
                    continue
                inputs = decoder_inputs(model, batch)
                causal = share and _plainly_causal(model, inputs)
                if number == 0 and not self._check(model, batch, inputs, position, causal):
                    share = causal = False
                if causal:
                    examples += _examples(inputs, batch, position, image_token, prefixes)
                    order += index
                else:
                    self._replayed.append((inputs, position))
                    replayed_order += index
        self._batches = list(_prefix_batches(examples, *self._limits))
        order = [order[i] for batch in self._batches for i in batch.index] + replayed_order
        self._order = torch.argsort(torch.tensor(order))

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Float[Tensor, "examples vocabulary"]:
        """The logits, float32, on the CPU, in the order of the examples."""
        with evaluating(model):
            answers = [self._run(model, batch) for batch in self._batches]
            answers += [self._replay(model, *replayed) for replayed in self._replayed]
            answers += [self._read(model, whole_pass(model, b), p) for b, p in self._whole]
        return torch.cat(answers)[self._order]

    def _run(self, model: nn.Module, batch: "_PrefixBatch") -> Tensor:
        return self._read(model, batch.last_hidden(decoder(model)), batch.position)

    def _replay(self, model: nn.Module, inputs: dict[str, Any], position: Tensor) -> Tensor:
        return self._read(model, decoder(model)(**inputs).last_hidden_state, position)

    def _read(self, model: nn.Module, hidden: Tensor, position: Tensor) -> Tensor:
        rows = torch.arange(len(position))
        return self._head(model, hidden[rows, position.to(hidden.device)]).cpu()

    def _check(
        self, model: nn.Module, batch: Batch, inputs: dict[str, Any], position: Tensor, share: bool
    ) -> bool:
        """Find the model's head; False if shared prefixes change the logits."""
        self._head, expected = fit_output_head(model, batch, position)

        def fits(answers: Tensor) -> bool:
            error = float((answers - expected).abs().max())
            return error <= tolerance(model, expected, roundings=16)

        if share:
            examples = list(_examples(inputs, batch, position, image_token_id(model), {}))
            batches = list(_prefix_batches(examples, *self._limits))
            order = torch.argsort(torch.tensor([i for own in batches for i in own.index]))
            if fits(torch.cat([self._run(model, own) for own in batches])[order]):
                return True
        if not fits(self._replay(model, inputs, position)):
            raise UnsupportedModelError(
                f"{type(model).__name__}: its language tower, called again with the same inputs, "
                "returns other logits than the model, so plans cannot be compared with it."
            )
        return not share


@dataclass(frozen=True, kw_only=True)
class _Example:
    """One row without its padding, up to the token before the answer.

    Attributes:
        prefix: embeddings up to the last image; one tensor for all examples with the same `key`.
        rest: embeddings after the prefix.
        position_ids: position ids of both; None if the decoder computes its own.
        key: hash of the prefix.
    """

    prefix: Float[Tensor, "P hidden"]
    rest: Float[Tensor, "S hidden"]
    position_ids: Int[Tensor, "... tokens"] | None
    key: bytes


@dataclass(frozen=True, kw_only=True)
class _PrefixBatch:
    """Examples that run together: first their distinct prefixes, then the rest of each.

    Attributes:
        prefix: embeddings, shape (prefixes, P, hidden); P may be 0.
        prefix_position_ids, position_ids: position ids, or None if the decoder computes its own.
        prefix_index: prefix of each example, shape (examples,), on the CPU because layers may be on
            several devices.
        rest: embeddings, shape (examples, S, hidden), padded on the right. No token attends to a
            later one, so the padding needs no mask.
        position: index into `rest` of the token before the answer, shape (examples,).
        index: place of each example among those that share.
    """

    prefix: Tensor
    prefix_position_ids: Tensor | None
    prefix_index: Tensor
    rest: Tensor
    position_ids: Tensor | None
    position: Tensor
    index: tuple[int, ...]

    def last_hidden(self, tower: nn.Module) -> Float[Tensor, "examples S hidden"]:
        """Hidden states of `rest` after the language tower."""
        cache = None
        if self.prefix.shape[1]:
            cache = tower(
                inputs_embeds=self.prefix, position_ids=self.prefix_position_ids, use_cache=True
            ).past_key_values
            for layer in cache.layers:
                _prepend(layer, self.prefix_index)
        return tower(
            inputs_embeds=self.rest,
            position_ids=self.position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state


def _prepend(layer: Any, prefix_index: Tensor) -> None:
    """Make a cache layer return each example's prefix before its own keys and values.

    They are copied per example when the layer runs. Copies in all layers at once would need the
    memory of a prefix once per example.
    """
    # The closure must not hold the layer: the cycle would delay the release of its memory.
    prefix_keys, prefix_values = layer.keys, layer.values

    def update(keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        index = prefix_index.to(keys.device)
        return (
            torch.cat([prefix_keys[index], keys], -2),
            torch.cat([prefix_values[index], values], -2),
        )

    layer.update = update


def _cache_bytes(model: nn.Module) -> int:
    """Bytes of the keys and values of one token in all layers."""
    config = _config(model)
    query_heads = common_value(config, "num_attention_heads") or 1
    # A tower whose layers differ has at most as many key heads as query heads.
    heads = common_value(config, "num_key_value_heads") or query_heads
    head_dim = common_value(config, "head_dim") or config.hidden_size // query_heads
    element_size = next(model.parameters()).element_size()
    return 2 * config.num_hidden_layers * heads * head_dim * element_size


def _config(model: nn.Module) -> Any:
    """The configuration of the language tower."""
    tower: Any = decoder(model)
    return tower.config.get_text_config()


def _plainly_causal(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether the decoder takes one padding mask and attends to all earlier tokens."""
    embeds, mask = inputs.get("inputs_embeds"), inputs.get("attention_mask")
    config = _config(model)
    window = common_value(config, "sliding_window")
    # Layers of other types keep a state instead of keys and values.
    types = set(getattr(config, "layer_types", None) or ())
    others = [value for name, value in inputs.items() if name not in SIMPLE_INPUTS]
    return (
        embeds is not None
        and types <= {"full_attention", "sliding_attention"}
        and not any(isinstance(value, Tensor | list | tuple | dict) for value in others)
        # Several masks come as a dictionary.
        and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2))
        and (window is None or window >= embeds.shape[1])
    )


def _examples(
    inputs: dict[str, Any],
    batch: Batch,
    position: Tensor,
    image_token: int | None,
    prefixes: dict[bytes, Tensor],
) -> Iterator[_Example]:
    """The examples of a batch. `prefixes` holds those of earlier batches; new ones are added."""
    embeds, position_ids = inputs["inputs_embeds"], inputs.get("position_ids")
    valid = valid_tokens(batch).to(embeds.device)
    for i, end in enumerate(position.tolist()):
        keep = valid[i, : end + 1].nonzero()[:, 0]
        ids = batch["input_ids"].to(keep.device)[i, keep]
        image_places = (ids == image_token).nonzero() if image_token is not None else ids[:0]
        # At least one token must follow the prefix, so that there is an output to read.
        length = min(int(image_places[-1]) + 1, len(keep) - 1) if len(image_places) else 0
        own_ids = None
        if position_ids is not None:
            own_ids = position_ids[..., i if position_ids.shape[-2] > 1 else 0, keep]
        prefix = embeds[i, keep[:length]]
        digest = hashlib.sha256(prefix.float().cpu().numpy().tobytes())
        if own_ids is not None:
            digest.update(own_ids[..., :length].cpu().numpy().tobytes())
        key = digest.digest() if length else b""
        yield _Example(
            prefix=prefixes.setdefault(key, prefix),
            rest=embeds[i, keep[length:]],
            position_ids=own_ids,
            key=key,
        )


def _prefix_batches(
    examples: Sequence[_Example], size: int, max_tokens: int
) -> Iterator[_PrefixBatch]:
    """Batches of examples whose prefixes have one length; equal prefixes are neighbours.

    A batch has at most `size` examples, and its distinct prefixes have at most `max_tokens` tokens;
    one prefix may have more.
    """

    def order(i: int) -> tuple[int, bytes, int]:
        return len(examples[i].prefix), examples[i].key, len(examples[i].rest)

    index: list[int] = []
    for i in sorted(range(len(examples)), key=order):
        length, distinct = len(examples[i].prefix), len({examples[j].key for j in [*index, i]})
        too_long = distinct > 1 and distinct * length > max_tokens
        full = len(index) == size or too_long
        if index and (full or len(examples[index[0]].prefix) != length):
            yield _prefix_batch([examples[j] for j in index], index)
            index = []
        index.append(i)
    if index:
        yield _prefix_batch([examples[j] for j in index], index)


def _prefix_batch(examples: Sequence[_Example], index: Sequence[int]) -> _PrefixBatch:
    length = len(examples[0].prefix)
    first = {example.key: example for example in reversed(examples)}  # one example per prefix
    number = {key: n for n, key in enumerate(first)}
    rest = nn.utils.rnn.pad_sequence([example.rest for example in examples], batch_first=True)
    return _PrefixBatch(
        prefix=torch.stack([example.prefix for example in first.values()]),
        prefix_position_ids=_stack_position_ids(first.values(), slice(0, length), length),
        prefix_index=torch.tensor([number[example.key] for example in examples]),
        rest=rest,
        position_ids=_stack_position_ids(examples, slice(length, None), rest.shape[1]),
        position=torch.tensor([len(example.rest) - 1 for example in examples]),
        index=tuple(index),
    )


def _stack_position_ids(examples: Iterable[_Example], part: slice, length: int) -> Tensor | None:
    """Position ids of part of every example, shape (..., examples, length), padded on the right."""
    padded = []
    for example in examples:
        if example.position_ids is None:
            return None
        ids = example.position_ids[..., part]
        padded.append(nn.functional.pad(ids, (0, length - ids.shape[-1])))
    return torch.stack(padded, -2)


def _answer_positions(batch: Batch) -> Int[Tensor, " batch"]:
    """Index of the token whose output predicts the first token of each answer."""
    length = batch["input_ids"].shape[1]
    last = length - 1 - torch.argmax(valid_tokens(batch).int().flip(1), 1)
    if "labels" not in batch:
        return last
    answered = batch["labels"] != -100
    # A row without labels is answered after its last token, as in a batch without labels.
    return torch.where(answered.any(1), torch.argmax(answered.int(), 1) - 1, last).clamp_min(0)
