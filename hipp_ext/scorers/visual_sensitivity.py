"""Visual sensitivity, HiPP-Prune's signal: what the language tower takes from the image.

Attention groups: the flow from vision tokens into the hidden states of text tokens, per head,
measured inside the attention function without ever holding attention for the whole sequence. FFN
groups: how far the block moves the hidden states of the vision tokens, shared among its channels by
what they write there.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hipp_ext.calibration import Batch, image_token_id
from hipp_ext.errors import UnsupportedModelError
from hipp_ext.families import crosses, norm_after, residual_scale, residual_stream
from hipp_ext.groups import Group, block_of, decoder, tower_layers, watching
from hipp_ext.projections import projection
from hipp_ext.scorers.base import (
    Groups,
    Scorer,
    Scores,
    consumer_weight,
    forward_hidden,
    valid_tokens,
)
from hipp_ext.scorers.wanda_sp import wanda_score

PROBE = "hipp_visual_probe"


@dataclass(frozen=True, kw_only=True)
class VisualSensitivity(Scorer):
    """Visual flow per KV group or query head, visual drift per FFN channel. Higher = keep.

    Both are relative to the hidden state, so they can be compared over layers. They are zero
    without an image.

    Attention: mean over the text tokens that can see an image of ||sum_j a_ij v_j W_O|| / ||h_i||,
    j over vision tokens that are no sinks, summed over the query heads of a KV group. Where a
    layer attends to the image alone (the cross-attention of Llama 3.2 Vision), j runs over all that
    it attends to. FFN: mean over vision tokens of 1 - cos(h, h + FFN(h)), split over channels in
    proportion to their WandaSP score on vision tokens.

    Args:
        sink_threshold: a vision token whose hidden state has a component this many times its root
            mean square is an attention sink and does not count.

    Raises (when called):
        UnsupportedModelError: the model has no image token, or groups of the vision tower are asked
            for.

    Source: HiPP-Prune (arXiv 2603.06270, abstract): "attention flow between vision tokens and
    language hidden states"; sinks: "See What You Are Told" (arXiv 2503.03321); drift: ATV-Pruning
    (arXiv 2603.16001).
    Differs from the paper: its formula is not public. Value-weighting, sink removal and the drift
    for FFN are our choice. Where a block's output is normed before it is added (Gemma), flow is
    taken before that norm, drift after it.
    """

    sink_threshold: float = 20.0
    kinds: ClassVar[tuple[str, ...]] = (
        "attention",
        "query_heads",
        "latent_attention",
        "ffn",
        "experts",
        "expert_channels",
    )
    towers: ClassVar[tuple[str, ...]] = ("language",)

    @torch.no_grad()
    def score(self, model: nn.Module, groups: Groups, batches: Sequence[Batch]) -> Scores:
        token = image_token_id(model)
        if token is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no image token: it has no visual sensitivity."
            )
        probe = _Probe(model, groups, self.sink_threshold)
        with probe.attached():
            for batch in batches:
                probe.batch = _Tokens(batch, token)
                forward_hidden(model, batch)
        return {g.name: probe.result(g) for g in groups}


class _Tokens:
    """Where the vision tokens of a batch are, and which text tokens can see one."""

    def __init__(self, batch: Batch, image_token: int):
        valid = valid_tokens(batch)
        self.vision = (batch["input_ids"] == image_token) & valid.to(batch["input_ids"].device)
        seeing = valid & ~self.vision & (self.vision.cumsum(1) > 0)
        self.count = int(seeing.sum())
        longest = max(int(seeing.sum(1).max()), 1)
        # Indices of the text tokens of every row, padded with token 0, which `used` then leaves
        # out.
        order = torch.argsort(~seeing, dim=1, stable=True)[:, :longest]
        self.text, self.used = order, seeing.gather(1, order)


class _Probe:
    def __init__(self, model: nn.Module, groups: Groups, sink_threshold: float):
        self.model, self.groups, self.sink_threshold = model, groups, sink_threshold
        self.layers = tower_layers(model, "language")
        self.batch: Any = None
        self.hidden: dict[int, Tensor] = {}  # layer -> hidden states that entered it, until it ends
        self.ffn_output: dict[int, Tensor] = {}
        self.totals: dict[str, Any] = {g.name: 0.0 for g in groups}
        self.counts: dict[str, int] = {g.name: 0 for g in groups}
        self.squares: dict[str, Tensor] = {}
        self.grams: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
        from transformers.modeling_utils import AttentionInterface

        AttentionInterface.register(PROBE, _probed_attention)
        # Without a mask of the same name transformers builds none, and padding would be attended
        # to.
        AttentionMaskInterface.register(PROBE, sdpa_mask)
        configs: list[tuple[Any, Any]] = []
        with contextlib.ExitStack() as stack:
            for module in decoder(self.model).modules():
                config = getattr(module, "config", None)
                if config is not None and all(config is not c for c, _ in configs):
                    configs.append((config, config._attn_implementation))
            stack.callback(
                lambda: [setattr(c, "_attn_implementation_internal", old) for c, old in configs]
            )
            for config, _ in configs:
                config._attn_implementation_internal = PROBE
            for g in self.groups:
                self._watch(stack, g, self.layers[g.layer])
            yield

    def _watch(self, stack: contextlib.ExitStack, g: Group, layer: nn.Module) -> None:
        block = block_of(self.model, g)
        if g.place == "attention":
            block._hipp_probe = (self, g)
            stack.callback(lambda: delattr(block, "_hipp_probe"))

            def remember(_: nn.Module, args: tuple, kwargs: dict) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                self.hidden[g.layer] = residual_stream(layer, hidden)

            def forget(*_: Any) -> None:
                self.hidden.pop(g.layer, None)

            stack.callback(layer.register_forward_pre_hook(remember, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(forget).remove)
            return
        size = g.width * g.inputs
        self.squares.setdefault(g.name, torch.zeros(size, dtype=torch.float64))
        stack.enter_context(watching(self.model, g, partial(self._channels, g)))
        # Gemma norms what a block returns before it is added.
        added = norm_after(layer, g.place) or (
            projection(self.model, g.consumer) if block is layer else block
        )
        for hook in (
            layer.register_forward_hook(partial(self._drift, g)),
            added.register_forward_hook(
                partial(self._keep_output, g, residual_scale(layer, g.place))
            ),
        ):
            stack.callback(hook.remove)

    def add_flow(
        self, g: Group, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: Any
    ) -> None:
        """Rows of the attention matrix for text queries only: (batch, heads, text, keys)."""
        text, used = self.batch.text.to(query.device), self.batch.used.to(query.device)
        _, heads, _, head_dim = query.shape
        groups, repeat = key.shape[1], heads // key.shape[1]
        rows = query.gather(2, text[:, None, :, None].expand(-1, heads, -1, head_dim))
        # Query heads of a KV group share its keys.
        grouped = rows.unflatten(1, (groups, repeat)).flatten(2, 3)
        logits = (grouped @ key.transpose(2, 3)) * (scaling or head_dim**-0.5)
        logits = logits.unflatten(2, (repeat, -1)).flatten(1, 2)
        crossing = crosses(self.layers[g.layer])
        if mask is not None or not crossing:
            logits = logits + _row_bias(mask, text, key.shape[2], logits.dtype)
        hidden = self.hidden[g.layer]
        seen = self.batch.vision.to(hidden.device) & ~self._sinks(hidden.float())
        vision = seen.to(query.device)
        if crossing:
            vision = vision.new_ones(len(vision), key.shape[2])
        shares = logits.softmax(-1, dtype=torch.float32).to(value.dtype)
        attention = (shares * vision[:, None, None, :]).unflatten(1, (groups, repeat))
        context = (attention.flatten(2, 3) @ value).unflatten(2, (repeat, -1))
        context = context.flatten(1, 2).float()  # (batch, heads, text, head_dim)
        if g.name not in self.grams:
            weight = consumer_weight(self.model, g).float()
            columns = weight.unflatten(1, (-1, value.shape[-1])).transpose(0, 1)
            # ||c W_O||^2 = c G c, as wide as the values of a head
            self.grams[g.name] = columns.transpose(1, 2) @ columns
        norm = ((context @ self.grams[g.name]) * context).sum(-1).clamp_min(0).sqrt()
        size = hidden.float().norm(dim=-1).to(query.device).gather(1, text).clamp_min(1e-6)
        flow = ((norm / size[:, None]) * used[:, None]).sum((0, 2)).view(g.width, -1).sum(1)
        self.totals[g.name] = self.totals[g.name] + flow.double().cpu()
        self.counts[g.name] += self.batch.count

    def _sinks(self, hidden: Float[Tensor, "batch tokens hidden"]) -> Bool[Tensor, "batch tokens"]:
        return hidden.abs().amax(-1) > self.sink_threshold * hidden.square().mean(-1).sqrt()

    def _channels(self, g: Group, x: Tensor, tokens: Tensor | None, part: slice) -> None:
        vision = self.batch.vision.flatten().to(x.device)
        x = x.flatten(0, -2)[vision if tokens is None else vision[tokens]]
        self.squares[g.name][part] += x.float().square().sum(0).double().cpu()

    def _keep_output(
        self, g: Group, multiplier: float, _: nn.Module, args: tuple, output: Any
    ) -> None:
        added = output[0] if isinstance(output, tuple) else output
        # OPT's have no dimension of rows.
        self.ffn_output[g.layer] = added.reshape(*self.batch.vision.shape, -1) * multiplier

    def _drift(self, g: Group, _: nn.Module, args: tuple, output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        after = residual_stream(self.layers[g.layer], after)
        where = self.batch.vision.to(after.device)
        moved = self.ffn_output.pop(g.layer).view(after.shape)[where].float()
        after = after[where].float()
        drift = 1 - torch.nn.functional.cosine_similarity(after - moved, after, dim=-1)
        self.totals[g.name] = self.totals[g.name] + float(drift.sum())
        self.counts[g.name] += after.shape[0]

    def result(self, g: Group) -> Float[Tensor, " width"]:
        """Mean flow of the units (attention), or their shares of the mean drift (FFN)."""
        if not self.counts[g.name]:
            return torch.zeros(g.width)
        total, count = self.totals[g.name], self.counts[g.name]
        if g.place == "attention":
            return residual_scale(self.layers[g.layer], g.place) * total / count
        share = wanda_score(self.model, g, self.squares[g.name].sqrt())
        return total / count * share / share.sum().clamp_min(1e-30)


def _probed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """The output of sdpa; the module's probe, if any, sees the inputs.

    It is a module-level function because transformers keeps a reference to it, and it must not keep
    a model alive.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    probe, group = getattr(module, "_hipp_probe", (None, None))
    if probe is not None and group is not None and probe.batch.count:
        probe.add_flow(group, query, key, value, attention_mask, kwargs.get("scaling"))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


def _row_bias(mask: Tensor | None, text: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """(batch, 1, text, keys) additive mask of the query rows; causal where there is no mask."""
    if mask is None:
        allowed = torch.arange(keys, device=text.device)[None, None] <= text[:, :, None]
        allowed = allowed[:, None]
    else:
        index = text[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        picked = mask.expand(text.shape[0], -1, -1, -1).gather(2, index)[..., :keys]
        if picked.dtype != torch.bool:
            return picked
        allowed = picked
    return torch.zeros(allowed.shape, dtype=dtype, device=text.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )
