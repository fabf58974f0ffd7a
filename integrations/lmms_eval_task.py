"""Tasks of lmms-eval on local tables; lmms-eval imports this file by the name in the task files."""

# pyright: reportMissingImports=false

import dataclasses
from typing import Any

from datasets import DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask, TaskConfig
from lmms_eval.models import MODEL_REGISTRY_V2

from hipp_ext.integrations.lm_eval_data import load


class TableTask(ConfigurableMessagesTask):
    """A task whose questions are a table of the user, read as the lm-eval task of the same name.

    Args:
        config: what the task file has. Keys of lm-eval that lmms-eval does not have are left out.

    Raises:
        DataError: the table does not exist, or is not one of the benchmark.
    """

    def __init__(self, config: dict[str, Any]):
        known = {field.name for field in dataclasses.fields(TaskConfig)}
        super().__init__(config={k: value for k, value in config.items() if k in known})

    def download(self, dataset_kwargs: Any = None) -> None:
        """Read the table; nothing is downloaded."""
        self.dataset = DatasetDict(**load(**(dataset_kwargs or {})))
        self.dataset_no_image = self.dataset  # it has the paths of its pictures

    def construct_requests(self, doc_id: int, ctx: str, **kwargs: Any) -> Any:
        """The request in the form that the model takes, which the command line names."""
        asked = getattr(self, "args", None)
        if asked is not None:
            found = MODEL_REGISTRY_V2.resolve(asked.model, asked.force_simple)
            if found.model_type == "simple":
                return ConfigurableTask.construct_requests(self, doc_id, ctx, **kwargs)
        return super().construct_requests(doc_id, ctx, **kwargs)
