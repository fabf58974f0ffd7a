"""Answers scored in one forward pass: the next-token distribution where the answer would start.

Everything before the language tower (vision tower, projector, embeddings) is computed once and replayed, because a
plan for the language tower does not change it. Rows that begin with the same pictures share that beginning: POPE asks
six questions about one picture, and LLaVA-1.5 spends 576 of some 620 tokens on it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hipp_ext.calibration import Batch, image_token_id
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.groups import check_loaded, decoder
from hipp_ext.output_head import OutputHead, fit_output_head, tolerance
from hipp_ext.scorers.base import evaluating, forward, valid_tokens

SIMPLE = {
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "cache_position",
}
MEMORY_LIMIT = 2 << 30  # bytes that keys and values of beginnings take, in all layers


class AnswerLogits:
    """`logits(model)` gives, for every row of `batches`, the logits of the token that would answer it.

    The answer starts at the first label, or after the last token where a batch has no labels.

    What is kept between calls are the inputs of the language tower, what rows share once, on the device of the embeddings: by
    that, 1.2 GB for 192 questions of POPE and of ScienceQA to LLaVA-1.5-7B in bfloat16, and as much again while they are
    made. A call needs up to `memory_limit` for keys and values, and one layer's activations, the keys and values of its rows
    among them.

    Args:
        model: measured once on `batches`; later calls may prune, mask or slice its language tower, and nothing else.
        batches: as the model's forward takes them.
        share: compute what rows have in common (everything up to their last picture) once per call. Same logits up to
            rounding. Models whose decoder is not plainly causal are replayed batch by batch instead.
        memory_limit: for keys and values of what rows have in common [bytes]; fewer beginnings run together where they would
            take more, one at least.

    What comes out is compared once, on the first batch, with `model(**batch).logits`.

    Raises:
        UnsupportedModelError: weights are offloaded, or the answers are not what the model's own logits say.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        *,
        share: bool = True,
        memory_limit: int = MEMORY_LIMIT,
    ):
        rows: list[_Row] = []
        beginnings: dict[bytes, Tensor] = {}
        places: list[int] = []  # of `rows` among all rows
        self._replayed: list[tuple[dict[str, Any], Tensor, Tensor]] = []
        begun = 0
        token = image_token_id(model)
        check_loaded(model)
        self._head = OutputHead()
        size = max((len(batch["input_ids"]) for batch in batches), default=1)
        self._limit = (size, memory_limit // _cache_bytes(model))
        with torch.no_grad(), evaluating(model):
            for number, batch in enumerate(batches):
                inputs, position = _decoder_inputs(model, batch), _answer_positions(batch)
                index = torch.arange(begun, begun + len(position))
                begun += len(position)
                if number == 0 and not self._check(
                    model, batch, inputs, position, share and _plainly_causal(model, inputs)
                ):
                    share = False
                if share and _plainly_causal(model, inputs):
                    rows += _rows(inputs, batch, position, token, beginnings)
                    places += index.tolist()
                else:
                    self._replayed.append((inputs, position, index))
        self._chunks = list(_chunks(rows, *self._limit))
        indices = [torch.tensor(places)[chunk.index] for chunk in self._chunks] + [
            index for *_, index in self._replayed
        ]
        self._order = torch.argsort(torch.cat(indices))

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Float[Tensor, "rows vocabulary"]:
        """float32, on the CPU, in the order of the batches' rows."""
        with evaluating(model):
            answers = [self._run(model, chunk) for chunk in self._chunks]
            answers += [
                self._replay(model, inputs, position) for inputs, position, _ in self._replayed
            ]
        return torch.cat(answers)[self._order]

    def _run(self, model: nn.Module, chunk: "_Chunk") -> Tensor:
        return self._read(model, chunk.last_hidden(decoder(model)), chunk.position)

    def _replay(self, model: nn.Module, inputs: dict[str, Any], position: Tensor) -> Tensor:
        return self._read(model, decoder(model)(**inputs).last_hidden_state, position)

    def _read(self, model: nn.Module, hidden: Tensor, position: Tensor) -> Tensor:
        return self._head(model, hidden[torch.arange(len(position)), position.to(hidden.device)])

    def _check(
        self, model: nn.Module, batch: Batch, inputs: dict[str, Any], position: Tensor, share: bool
    ) -> bool:
        """Find the model's head; False where rows that share beginnings get other logits than the model's own."""
        self._head, expected = fit_output_head(model, batch, position)

        def fits(answers: Tensor) -> bool:
            return float((answers - expected).abs().max()) <= tolerance(
                model, expected, roundings=16
            )

        if share:
            rows = list(_rows(inputs, batch, position, image_token_id(model), {}))
            chunks = list(_chunks(rows, *self._limit))
            order = torch.argsort(torch.cat([torch.as_tensor(chunk.index) for chunk in chunks]))
            if fits(torch.cat([self._run(model, chunk) for chunk in chunks])[order]):
                return True
        if not fits(self._replay(model, inputs, position)):
            raise UnsupportedModelError(
                f"{type(model).__name__}: its language tower, called again with the same inputs, gives other logits than the "
                "model, so that plans cannot be compared by it."
            )
        return not share


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One row without its padding, up to the token that the answer follows; `begin` is one tensor for all rows of a `key`."""

    begin: Float[Tensor, "P hidden"]
    rest: Float[Tensor, "S hidden"]
    places: Int[Tensor, "... tokens"] | None
    key: bytes


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Rows run together: their distinct beginnings first, then what follows, reading the keys and values of its beginning.

    Attributes:
        begin: (beginnings, P, hidden) embeddings; P may be 0.
        begin_places, places: position ids, or None where the decoder counts for itself.
        owner: (rows,) which beginning a row has; on the CPU, for layers may lie on several devices.
        rest: (rows, S, hidden) right-padded; nothing looks ahead, so the padding needs no mask.
        position: (rows,) index into `rest` of the token that the answer follows.
        index: (rows,) place of each row among those that share.
    """

    begin: Tensor
    begin_places: Tensor | None
    owner: Tensor
    rest: Tensor
    places: Tensor | None
    position: Tensor
    index: Tensor

    def last_hidden(self, tower: nn.Module) -> Float[Tensor, "rows S hidden"]:
        """Hidden states of `rest` after the whole tower."""
        cache = None
        if self.begin.shape[1]:
            cache = tower(
                inputs_embeds=self.begin, position_ids=self.begin_places, use_cache=True
            ).past_key_values
            for layer in cache.layers:
                _hand_out(layer, self.owner)
        return tower(
            inputs_embeds=self.rest,
            position_ids=self.places,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state


def _hand_out(layer: Any, owner: Tensor) -> None:
    """Make a cache layer of beginnings one that rows read before their own keys and values, and that none adds to.

    The rows get them when it is the layer's turn: in all layers at once they would take the beginnings' memory once per row.
    """
    begin_keys, begin_values = (
        layer.keys,
        layer.values,
    )  # and not the layer: it would hold itself, and be freed late

    def update(keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows = owner.to(keys.device)
        return torch.cat([begin_keys[rows], keys], -2), torch.cat([begin_values[rows], values], -2)

    layer.update = update


def _cache_bytes(model: nn.Module) -> int:
    """Bytes that keys and values of one token take in all layers."""
    config = _config(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return 2 * config.num_hidden_layers * width * next(model.parameters()).element_size()


def _config(model: nn.Module) -> Any:
    """Of the language tower."""
    tower: Any = decoder(model)
    return tower.config.get_text_config()


def _plainly_causal(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether the decoder takes embeddings, a padding mask and positions, and looks back as far as there are tokens."""
    embeds, mask = inputs.get("inputs_embeds"), inputs.get("attention_mask")
    window = getattr(_config(model), "sliding_window", None)
    return (
        embeds is not None
        and all(
            k in SIMPLE or not isinstance(v, Tensor | list | tuple | dict)
            for k, v in inputs.items()
        )
        and (
            mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        )  # several masks are a dictionary
        and (window is None or window >= embeds.shape[1])
    )


def _rows(
    inputs: dict[str, Any],
    batch: Batch,
    position: Tensor,
    image_token: int | None,
    beginnings: dict[bytes, Tensor],
) -> Iterator[_Row]:
    """The rows of a batch. `beginnings` holds those of earlier batches, and of these rows afterwards."""
    embeds, places = inputs["inputs_embeds"], inputs.get("position_ids")
    valid = valid_tokens(batch).to(embeds.device)
    for i, end in enumerate(position.tolist()):
        keep = valid[i, : end + 1].nonzero()[:, 0]
        ids = batch["input_ids"].to(keep.device)[i, keep]
        pictured = (ids == image_token).nonzero() if image_token is not None else ids[:0]
        # At least one token stays behind to be read.
        shared = min(int(pictured[-1]) + 1, len(keep) - 1) if len(pictured) else 0
        place = None if places is None else places[..., i if places.shape[-2] > 1 else 0, keep]
        begin = embeds[i, keep[:shared]]
        digest = hashlib.sha256(begin.float().cpu().numpy().tobytes())
        if place is not None:
            digest.update(place[..., :shared].cpu().numpy().tobytes())
        key = digest.digest() if shared else b""
        yield _Row(
            begin=beginnings.setdefault(key, begin),
            rest=embeds[i, keep[shared:]],
            places=place,
            key=key,
        )


def _chunks(rows: Sequence[_Row], size: int, tokens: int) -> Iterator[_Chunk]:
    """Rows of one length of beginning together, those of one beginning side by side.

    `size` rows at a time, or fewer: those whose different beginnings have `tokens` tokens in all, of one beginning at least.
    """
    order = sorted(
        range(len(rows)), key=lambda i: (len(rows[i].begin), rows[i].key, len(rows[i].rest))
    )
    some: list[int] = []
    for i in order:
        length, distinct = len(rows[i].begin), len({rows[j].key for j in [*some, i]})
        too_long = distinct > 1 and distinct * length > tokens
        if some and (len(some) == size or len(rows[some[0]].begin) != length or too_long):
            yield _chunk([rows[j] for j in some], some)
            some = []
        some.append(i)
    if some:
        yield _chunk([rows[j] for j in some], some)


def _chunk(rows: Sequence[_Row], index: Sequence[int]) -> _Chunk:
    shared = len(rows[0].begin)
    first = {row.key: row for row in reversed(rows)}  # one row per beginning
    number = {key: n for n, key in enumerate(first)}
    rest = nn.utils.rnn.pad_sequence([row.rest for row in rows], batch_first=True)
    return _Chunk(
        begin=torch.stack([row.begin for row in first.values()]),
        begin_places=_stack_places(
            [row.places for row in first.values()], slice(0, shared), shared
        ),
        owner=torch.tensor([number[row.key] for row in rows]),
        rest=rest,
        places=_stack_places([row.places for row in rows], slice(shared, None), rest.shape[1]),
        position=torch.tensor([len(row.rest) - 1 for row in rows]),
        index=torch.tensor(index),
    )


def _stack_places(places: Sequence[Tensor | None], part: slice, length: int) -> Tensor | None:
    """(..., rows, length) position ids of part of every row, padded at the end."""
    padded = []
    for place in places:
        if place is None:
            return None
        cut = place[..., part]
        padded.append(nn.functional.pad(cut, (0, length - cut.shape[-1])))
    return torch.stack(padded, -2)


class _Captured(Exception):
    """Ends a forward pass once the inputs of the language tower are known."""


def _decoder_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    captured: dict[str, Any] = {}

    def capture(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        assert not args, "transformers calls its decoders with keywords"
        captured.update(kwargs)
        raise _Captured

    handle = decoder(model).register_forward_pre_hook(capture, with_kwargs=True)
    try:
        forward(model, batch)
    except _Captured:
        pass
    finally:
        handle.remove()
    return captured


def _answer_positions(batch: Batch) -> Tensor:
    """(batch,) index of the token whose output predicts the answer's first token."""
    length = batch["input_ids"].shape[1]
    if "labels" in batch:
        answered = batch["labels"] != -100
        first = torch.argmax(answered.int(), 1)
        # A row without any label is answered after its last token, like a batch without labels.
        return torch.where(answered.any(1), first - 1, _last_token(batch, length)).clamp_min(0)
    return _last_token(batch, length)


def _last_token(batch: Batch, length: int) -> Tensor:
    return length - 1 - torch.argmax(valid_tokens(batch).int().flip(1), 1)
