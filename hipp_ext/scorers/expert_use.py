"""Expert use: how strongly the router sends tokens to an expert, and how much the expert adds."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from hipp_ext.calibration import Batch
from hipp_ext.errors import CalibrationError
from hipp_ext.groups import Group, block_of, watching
from hipp_ext.kinds.mixture_kind import mixture_of
from hipp_ext.scorers.base import Groups, Scorer, Scores, forward_hidden, valid_tokens
from hipp_ext.scorers.wanda_sp import WandaSP

Form = Literal["strength", "frequency"]


@dataclass(frozen=True, kw_only=True)
class ExpertUse(Scorer):
    """Mean of g_e(x) ||f_e(x)||_2 over the tokens x that the router sends to expert e. Higher =
    keep.

    g is the router's weight of the expert for the token, f what the expert puts out. An expert that
    no token of the calibration is sent to scores 0. With form="frequency" the score is the fraction
    of the tokens that are sent to the expert. Groups of other units than experts are scored by
    `others`; their scores cannot be compared with those of experts.

    Attributes:
        form: "strength" or "frequency".
        others: scorer of all other groups; None: WandaSP.

    Raises:
        CalibrationError: an unknown form.

    Source: REAP (arXiv 2510.13999), router-weighted expert activation; the frequency is one of its
    baselines.
    Differs from the paper: where the router's weight scales what goes into an expert (Llama 4),
    the norm is that of the output as it is added.
    """

    form: str = "strength"
    others: Scorer | None = None

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise CalibrationError(
                f"ExpertUse has the forms {', '.join(get_args(Form))}; got {self.form!r}."
            )

    @torch.no_grad()
    def score(self, model: nn.Module, groups: Groups, batches: Sequence[Batch]) -> Scores:
        rest = [g for g in groups if g.kind != "experts"]
        scores = dict((self.others or WandaSP()).score(model, rest, batches)) if rest else {}
        uses = [_Use(model, g) for g in groups if g.kind == "experts"]
        with contextlib.ExitStack() as stack:
            for use in uses:
                stack.enter_context(watching(model, use.group, use.look))
            for batch in batches if uses else ():
                valid = valid_tokens(batch).flatten()
                for use in uses:
                    use.valid = valid
                    use.tokens += int(valid.sum())
                forward_hidden(model, batch)
        return scores | {use.group.name: use.scores(self.form) for use in uses}


class _Use:
    """What is counted of a group's experts."""

    def __init__(self, model: nn.Module, group: Group):
        self.group, self.mixture = group, mixture_of(block_of(model, group))
        self.strength = torch.zeros(group.width, dtype=torch.float64)
        self.count = torch.zeros(group.width, dtype=torch.float64)
        self.tokens = 0
        self.valid = torch.empty(0)  # mask of the tokens of the batch that is running

    def look(self, z: Tensor, tokens: Tensor | None, part: slice) -> None:
        """Adds up the norms of what an expert adds for its tokens."""
        assert tokens is not None, "a mixture shows the tokens of each expert"
        expert = part.start // self.group.inputs
        z = z[self.valid.to(z.device)[tokens]]
        z = z[z.abs().sum(1) > 0]  # every expert of Llama 4 gets all tokens, others scaled to 0
        added = z.float() @ self.mixture.reading_weight(expert).float().T
        self.strength[expert] += float(added.norm(dim=1).sum())
        self.count[expert] += len(z)

    def scores(self, form: str) -> Tensor:
        """The scores of the experts."""
        if form == "frequency":
            return self.count / max(self.tokens, 1)
        return self.strength / self.count.clamp_min(1)
