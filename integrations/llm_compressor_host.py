"""The parts of llm-compressor that hipp-ext touches, each behind a guard against what comes with
it.
"""

import contextlib
import functools
import importlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from hipp_ext.errors import MissingExtraError, RecipeError
from hipp_ext.groups import Group
from hipp_ext.plan import PruningPlan
from hipp_ext.surgery.checkpoint import check_saveable, complete_folder, settings_as_they_are

LOG_SWITCH = "LLM_COMPRESSOR_LOG_DISABLED"
# Modifiers that change weights so that errors elsewhere in a row are made up for.
COMPENSATING = ("GPTQModifier", "SparseGPTModifier")


def import_llmcompressor() -> ModuleType:
    """The module llmcompressor, imported without taking away the log sinks that the process has set
    up.

    It would remove all sinks of loguru, those of other libraries and of the user included, and
    print to stdout. Here it gets its own sink only where nobody has set up another.

    Raises:
        MissingExtraError: llmcompressor, or something that it needs, is not installed.
    """
    if sys.modules.get("llmcompressor") is None:
        wanted = os.environ.get(LOG_SWITCH)
        os.environ[LOG_SWITCH] = "true"  # then it leaves the sinks alone
        try:
            importlib.import_module("llmcompressor")
        except ModuleNotFoundError as error:
            raise MissingExtraError(error.name or "llmcompressor", "llm-compressor") from error
        finally:
            del os.environ[LOG_SWITCH]
            if wanted is not None:
                os.environ[LOG_SWITCH] = wanted
        _start_logging(importlib.import_module("llmcompressor.logger"))
    log = importlib.import_module("llmcompressor.logger").logger
    if (
        "METRIC" not in log._core.levels
    ):  # with its logging switched off, GPTQ would log at a level that does not exist
        log.level("METRIC", no=38, color="<yellow>")
    return sys.modules["llmcompressor"]


def _start_logging(log: Any) -> None:
    log.LOGGER_CONFIG.disabled = False
    if list(log.logger._core.handlers) == [0]:  # loguru's default sink and no other
        log.configure_logger(log.LOGGER_CONFIG)
    elif os.environ.get(LOG_SWITCH, "").lower() != "true":
        log.logger.enable("llmcompressor")


def other_modifiers(modifier: Any) -> list[Any]:
    """The modifiers of the recipe that is being carried out, without `modifier`."""
    from llmcompressor.core import active_session

    return [m for m in active_session().lifecycle.recipe.modifiers if m is not modifier]


def check_order(model: nn.Module, modifier: Any) -> None:
    """Raise RecipeError where `model` is quantised already, by a modifier further up in the recipe
    or earlier.
    """
    quantised = [name for name, m in model.named_modules() if hasattr(m, "quantization_scheme")]
    if quantised:
        above = [type(m).__name__ for m in other_modifiers(modifier) if m.initialized]
        raise RecipeError(
            f"{type(modifier).__name__} came after the model was quantised "
            f"({', '.join(above) or 'in an earlier call'}; "
            f"{len(quantised)} layers, such as {quantised[0]}): the scales would be those of units "
            "that are gone. Put "
            f"{type(modifier).__name__} first in the recipe. Nothing was pruned."
        )


def check_mixing(modifier: Any) -> None:
    """Raise RecipeError where another modifier of the recipe mixes units, so that zeros would not
    stay zeros.
    """
    for other in other_modifiers(modifier):
        name = type(other).__name__
        # SpinQuant's other rotations stay within a head or within the residual stream.
        if name == "QuIPModifier" or (name == "SpinQuantModifier" and "R4" in other.rotations):
            raise RecipeError(
                f'{type(modifier).__name__} with mode="mask" and {name} in one recipe: {name} '
                "rotates units into each other, "
                'and what was zero is filled again. Use mode="shrink", or leave one of them out. '
                "Nothing was pruned."
            )


def check_compensation(modifier: Any) -> None:
    """Raise RecipeError where another modifier of the recipe would fill the columns of query heads
    that are set to zero.

    Without its query rows a head still puts out the mean of its values: its input to o_proj is not
    zero, and what makes up for errors by means of the inputs gives its columns weights again.
    """
    for other in other_modifiers(modifier):
        name = type(other).__name__
        if name in COMPENSATING:
            raise RecipeError(
                f'{type(modifier).__name__} with mode="mask" and query heads, and {name} in one '
                f"recipe: {name} makes up for errors in o_proj, and fills the columns of heads "
                'that are gone. Use mode="shrink", or a plan of whole KV groups. Nothing was '
                "pruned."
            )


def group_sizes(model: nn.Module, modifier: Any) -> dict[str, int]:
    """Name of each linear layer whose weights the recipe will quantise in groups of columns ->
    columns per group.
    """
    from compressed_tensors.utils import match_named_modules
    from compressed_tensors.utils.match import match_targets
    from llmcompressor.modifiers.quantization import QuantizationMixin

    sizes: dict[str, int] = {}
    for other in other_modifiers(modifier):
        if not (isinstance(other, QuantizationMixin) and other.has_config()):
            continue
        groups: Any = other.resolved_config.config_groups
        schemes: dict[str, Any] = {
            target: scheme for scheme in groups.values() for target in scheme.targets
        }
        for name, module in match_named_modules(model, schemes, other.ignore):
            weights = schemes[match_targets(name, module, schemes)[0]].weights
            if (
                isinstance(module, nn.Linear)
                and weights is not None
                and weights.strategy in ("group", "tensor_group")
            ):
                sizes[name] = weights.group_size
    return sizes


def check_group_sizes(groups: Sequence[Group], plan: PruningPlan, sizes: Mapping[str, int]) -> None:
    """Raise RecipeError where the columns that stay in a layer do not divide into the recipe's
    quantisation groups.

    llm-compressor checks this itself, but not for layers with fewer columns than a group, and only
    once they are sliced.
    """
    wrong, dense = [], []
    for group, entry in zip(groups, plan.groups, strict=True):
        size, columns = sizes.get(group.consumer, 1), entry.keep * group.columns
        if columns % size:
            wrong.append(f"{group.name} keeps {columns} columns in groups of {size}")
            if group.width * group.columns % size and group.multiple(size) > group.width:
                dense.append(group.name)
    if not wrong:
        return
    needed = round_to_for(groups, sizes)
    cure = (
        f"Make the plan with round_to={needed} (Bounds(round_to={needed}), or "
        f"`hipp plan --round-to {needed}`)"
    )
    if dense:
        cure = (
            f"No round_to can help {', '.join(dense[:3])}: unpruned they do not divide either. "
            "Choose a smaller group_size"
        )
    raise RecipeError(
        "These layers cannot be quantised in groups: "
        f"{'; '.join(wrong[:6])}{'; ...' if len(wrong) > 6 else ''}. {cure}, or "
        "quantise by channel. Nothing was pruned."
    )


def round_to_for(groups: Sequence[Group], sizes: Mapping[str, int]) -> int:
    """The least round_to with which the columns of every group divide into the recipe's
    quantisation groups.
    """
    return math.lcm(*(sizes.get(g.consumer, 1) for g in groups))


def complete_saves(model: Any) -> None:
    """From now on `model.save_pretrained` writes folders that `hipp_ext.load_pruned` reads to the
    bit.

    Inside, `config._name_or_path` is empty: llm-compressor would else replace the configuration by
    the file that the dense model came from, and lose the widths.
    """
    save = model.save_pretrained
    if getattr(save, "completes", False):
        return

    @functools.wraps(
        save
    )  # with llm-compressor's mark on its own wrapper, which keeps it from wrapping a second time
    def save_pretrained(save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        check_saveable(model)
        with _without_origin(model.config), settings_as_they_are(model):
            result = save(save_directory, *args, **kwargs)
        complete_folder(model, Path(save_directory))
        return result

    save_pretrained.completes = True  # type: ignore[attr-defined]
    model.save_pretrained = save_pretrained


@contextlib.contextmanager
def _without_origin(config: Any) -> Iterator[None]:
    origin = config._name_or_path
    config._name_or_path = ""
    try:
        yield
    finally:
        config._name_or_path = origin
