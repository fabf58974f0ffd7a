"""hipp-ext in llm-compressor recipes: prune a model by a plan, and quantise it, in one `oneshot`
call.

Importing this module registers `HippStructuredPruningModifier` for YAML recipes:

    prune_stage:
      pruning_modifiers:
        HippStructuredPruningModifier: {plan: plan.json}
      quantization_modifiers:
        QuantizationModifier: {scheme: W8A8, targets: [Linear], ignore: ["re:.*lm_head",
            "re:.*vision_tower.*"]}
"""

import itertools
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    InstanceOf,
    PrivateAttr,
    field_serializer,
    field_validator,
    model_validator,
)
from torch import nn

from hipp_ext.budget import Bounds
from hipp_ext.errors import RecipeError
from hipp_ext.groups import AttentionUnit, Partial, find_groups
from hipp_ext.integrations.llm_compressor_data import sparsity_per_layer, validate_calibration
from hipp_ext.integrations.llm_compressor_host import (
    check_compensation,
    check_group_sizes,
    check_mixing,
    check_order,
    complete_saves,
    group_sizes,
    import_llmcompressor,
    round_to_for,
)
from hipp_ext.plan import PruningPlan
from hipp_ext.planner import HiPPPlanner
from hipp_ext.preference import Preference
from hipp_ext.surgery.checkpoint import PLAN
from hipp_ext.surgery.masks import match, removed_entries, zero_units
from hipp_ext.surgery.prune import prune

import_llmcompressor()
from compressed_tensors.offload import disable_onloading  # noqa: E402
from llmcompressor.modifiers import Modifier  # noqa: E402
from llmcompressor.modifiers.factory import ModifierFactory  # noqa: E402

__all__ = ["HippStructuredPruningModifier", "sparsity_per_layer", "validate_calibration"]

OF_PREFERENCE = ("round_to", "pruning_ratio", "attention_unit", "partial")
PLANNING_BATCHES = 32  # of the calibration; a plan needs fewer samples than a quantiser


class HippStructuredPruningModifier(Modifier):
    """Prunes whole KV groups, or query heads, and FFN channels, as `hipp_ext.prune` does, at the
    start of an llm-compressor recipe.

        oneshot(model=model, recipe=[HippStructuredPruningModifier(plan=plan),
        QuantizationModifier(...)])

    Everything happens on initialisation, before any calibration, so that every other modifier
    calibrates the pruned model, in whichever pipeline (independent, sequential, basic, datafree).
    It must stand before those that quantise. Afterwards `model.hipp_plan` is the plan, and
    `model.save_pretrained`, `output_dir=` and `hipp_ext.save_pruned` all write folders that
    `hipp_ext.load_pruned` restores to the bit, compressed or not.

    Args:
        plan: a PruningPlan, or the path of a plan file. A plan given as an object stands in the
            saved recipe.yaml as the file hipp_plan.json, which lies beside it.
        preference: instead of a plan: a Preference, or its three numbers by name. The plan is then
            made in place, from the first 32 batches of the calibration, or, without any, from
            hipp-ext's own pictures and questions.
        mode: "shrink": units are sliced out, the model gets smaller. "mask": units are set to zero,
            all shapes stay, any server can load the result; nothing gets smaller or faster.
        round_to: with a preference: the columns that stay are a multiple of this. None: what the
            recipe's quantisers need.
        pruning_ratio: with a preference: parameters removed / prunable parameters, in [0, 1); None:
            the policy decides.
        attention_unit: with a preference: "kv" (whole KV groups) or "query" (query heads). None:
            "kv".
        partial: with a preference: "refuse" or "report" a model with parts that can only stay
            whole, see `find_groups`. None: "refuse".

    Raises:
        PlanError: the plan does not fit the model, or is no plan.
        RecipeError: the model is quantised already; a layer's columns do not divide into
            quantisation groups (the message names the groups and a round_to that works); another
            modifier would fill or did fill zeros again (with mode="mask" and query heads, one that
            makes up for errors).
        BudgetError, CalibrationError, UnsupportedModelError: as `HiPPPlanner.plan` and `prune`.
            Before any of these, nothing was pruned.
    """

    plan: str | InstanceOf[PruningPlan] | None = None
    preference: dict[Literal["utility", "robustness", "compression"], float] | None = None
    mode: Literal["shrink", "mask"] = "shrink"
    round_to: int | None = Field(default=None, ge=1)
    pruning_ratio: float | None = Field(default=None, ge=0, lt=1)
    attention_unit: AttentionUnit | None = None
    partial: Partial | None = None
    _zeros: dict[str, Any] = PrivateAttr(default_factory=dict)

    @field_validator("plan", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("round_to", "pruning_ratio", mode="before")
    @classmethod
    def _plain_number(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(f"a number is needed, not {value}")
        return value.item() if hasattr(value, "item") else value  # of numpy and torch

    @field_validator("preference", mode="before")
    @classmethod
    def _preference_as_numbers(cls, value: Any) -> Any:
        return asdict(value) if isinstance(value, Preference) else value

    @field_validator("preference")
    @classmethod
    def _on_the_simplex(cls, value: dict | None) -> dict | None:
        return None if value is None else asdict(Preference(**value))

    @field_serializer("plan")
    def _plan_as_path(self, value: Any) -> str | None:
        return PLAN if isinstance(value, PruningPlan) else value

    @model_validator(mode="after")
    def _one_source(self) -> "HippStructuredPruningModifier":
        if (self.plan is None) == (self.preference is None):
            raise ValueError("Exactly one of plan and preference is needed.")
        if self.plan is not None and any(getattr(self, n) is not None for n in OF_PREFERENCE):
            raise ValueError(
                f"{', '.join(OF_PREFERENCE)} go with a preference; a plan already says what stays."
            )
        return self

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        """Check, plan where asked to, and prune."""
        model = state.model
        check_order(model, self)
        if self.mode == "mask":
            check_mixing(self)
        sizes = group_sizes(model, self) if self.mode == "shrink" else {}
        plan = self._make_plan(model, state.data.calib, sizes)
        groups = match(model, plan)
        check_group_sizes(groups, plan, sizes)
        if self.mode == "mask" and plan.attention_unit == "query":
            check_compensation(self)
        with disable_onloading():  # the weights themselves, wherever llm-compressor keeps them
            if self.mode == "shrink":
                prune(model, plan, inplace=True)
            else:
                self._zeros = removed_entries(model, plan)
                zero_units(model, plan)
        complete_saves(model)
        return True

    def on_finalize(self, state: Any, **kwargs: Any) -> bool:
        """Make sure that zeros stayed zeros."""
        if self._zeros:
            with disable_onloading():
                filled = sum(
                    int(state.model.get_parameter(n).data[i].count_nonzero())
                    for n, i in self._zeros.items()
                )
            if filled:
                raise RecipeError(
                    f'{filled} weights that mode="mask" had set to zero are no longer zero: '
                    "another modifier of the recipe "
                    'filled them again, and the model is not the pruned one. Use mode="shrink", or '
                    "leave that modifier out."
                )
        return True

    def _make_plan(
        self, model: nn.Module, calibration: Any, sizes: Mapping[str, int]
    ) -> PruningPlan:
        if isinstance(self.plan, PruningPlan):
            return self.plan
        if self.plan is not None:
            return PruningPlan.load(self.plan)
        assert self.preference is not None
        how: Any = {
            "attention_unit": self.attention_unit or "kv",
            "partial": self.partial or "refuse",
        }
        groups = find_groups(model, **how)
        round_to = self.round_to or round_to_for(groups, sizes)
        batches = (
            None if calibration is None else list(itertools.islice(calibration, PLANNING_BATCHES))
        )
        planner = HiPPPlanner(
            Preference(**self.preference),
            pruning_ratio=self.pruning_ratio,
            bounds=Bounds(round_to=round_to),
            **how,
        )
        return planner.plan(model, calibration=batches)


ModifierFactory.register(HippStructuredPruningModifier.__name__, HippStructuredPruningModifier)
