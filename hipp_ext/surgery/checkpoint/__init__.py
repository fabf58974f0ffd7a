"""Save and load pruned models whose layers differ in width; pad them for loaders that cannot.

A saved folder is a transformers folder (config.json with `per_layer_config`, safetensors,
processor) plus `hipp_ext.json`, which holds the widths of every group, and `hipp_plan.json`, the
plan. Models that llm-compressor quantised are saved and loaded likewise, with compressed weights.
"""

from hipp_ext.surgery.checkpoint.loading import load_pruned, outline, read_plan, resolve_device
from hipp_ext.surgery.checkpoint.saving import (
    PLAN,
    check_saveable,
    complete_folder,
    save_pruned,
    settings_as_they_are,
)
from hipp_ext.surgery.padding import pad_to_uniform

__all__ = [
    "PLAN",
    "check_saveable",
    "complete_folder",
    "load_pruned",
    "outline",
    "pad_to_uniform",
    "read_plan",
    "resolve_device",
    "save_pruned",
    "settings_as_they_are",
]
