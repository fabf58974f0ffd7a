"""The input of an evaluation, checked before the first model is loaded."""

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipp_ext.errors import DataError, MissingExtraError
from hipp_ext.evals.benchmarks import scored_rows
from hipp_ext.evals.hipp_vlm import check_model_folder
from hipp_ext.evals.runs import table_rows
from hipp_ext.evals.served import ServedVLM
from hipp_ext.evals.tables import Table, locate, read_table
from hipp_ext.integrations.vlmevalkit_files import file_format
from hipp_ext.integrations.vlmevalkit_models import Evaluated, FolderModel, ServedModel

DTYPES = ("float32", "bfloat16", "float16")
MODES = ("all", "infer", "eval")

Model = str | Path | ServedVLM


@dataclass(frozen=True, kw_only=True)
class Job:
    """The checked input of an evaluation."""

    models: list[Evaluated]
    tables: list[Table]
    work_dir: Path
    limit: int | None
    mode: str = "all"
    progress: bool
    verbose: bool
    command: str | None = None

    def exported_name(self, model: Evaluated) -> str:
        """The name of the model in VLMEvalKit's files: with its hash if two models share it."""
        same = Counter(other.name for other in self.models)[model.name] > 1
        return f"{model.name}-{model.model_hash[:8]}" if same else model.name


def prepare(
    models: Model | Sequence[Model],
    data: str | Sequence[str],
    lmu_data: str | Path | None,
    work_dir: str | Path,
    *,
    limit: int | None,
    batch_size: int,
    device: str | None,
    dtype: str | None,
    mode: str = "all",
    **output: Any,
) -> Job:
    """The checked arguments of `evaluate`; reads the data, but loads neither VLMEvalKit nor a
    model.
    """
    if importlib.util.find_spec("vlmeval") is None:
        raise MissingExtraError("vlmeval", "vlmeval")
    if (limit is not None and limit < 1) or batch_size < 1:
        raise DataError(f"limit and batch_size must be 1 or more, not {limit} and {batch_size}")
    if dtype not in (None, "auto", *DTYPES):
        raise DataError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if mode not in MODES:
        raise DataError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    file_format()  # checked now, and not after the last answer
    work_dir = Path(work_dir).expanduser().resolve()
    given = [models] if isinstance(models, str | Path | ServedVLM) else models
    checked = [one if isinstance(one, ServedVLM) else _folder(one, work_dir) for one in given]
    checked = list(dict.fromkeys(checked))
    found = list(
        dict.fromkeys(locate(one, lmu_data) for one in ([data] if isinstance(data, str) else data))
    )
    if not checked or not found:
        raise DataError("nothing to evaluate: give at least one model folder and one data set")
    if len({name for name, _ in found}) < len(found):
        raise DataError(
            f"two files for one name: {', '.join(f'{name}={path}' for name, path in found)}"
        )
    tables = [read_table(path, work_dir / "images", name=name) for name, path in found]
    for table in tables:
        if not scored_rows(table.name, [row.group for row in table_rows(table)[:limit]]):
            raise DataError(
                f"{table.name}: the limit of {limit} leaves no picture with both of its questions, "
                "and single questions are not scored. Give a higher limit"
            )
    return Job(
        models=_evaluated(checked, device=device, dtype=dtype or "auto", batch_size=batch_size),
        tables=tables,
        work_dir=work_dir,
        limit=limit,
        mode=mode,
        **output,
    )


def _folder(model: str | Path, work_dir: Path) -> Path:
    if isinstance(model, str) and model.startswith(("http://", "https://")):
        raise DataError(
            f"{model} is the address of a server. Give it as --base-url, in Python as "
            "hipp_ext.evals.served.ServedVLM(address)"
        )
    folder = check_model_folder(model)
    if work_dir.is_relative_to(folder.resolve()):
        raise DataError(
            f"the work folder {work_dir} is in the model folder {folder}, and would change its hash"
        )
    return folder


def _evaluated(
    checked: Sequence[Path | ServedVLM], *, device: str | None, dtype: str, batch_size: int
) -> list[Evaluated]:
    from hipp_ext.surgery.checkpoint import resolve_device

    folders = any(isinstance(one, Path) for one in checked)
    place = resolve_device(device) if folders else ""
    models: list[Evaluated] = []
    for one in checked:
        if isinstance(one, ServedVLM):
            models.append(ServedModel(one))
        else:
            models.append(FolderModel(one, device=place, dtype=dtype, batch_size=batch_size))
    return models
