"""Calibration data: the user's files, or batches, as what every scorer and planner measures on."""

from hipp_ext.calibration.batches import TASKS, Batch, Batches, Task, batches_digest
from hipp_ext.calibration.calibration import ROWS, Calibration, CalibrationLike
from hipp_ext.calibration.encoding import encode, encode_text, is_tokenizer, join_answer, tokenise
from hipp_ext.calibration.processors import check_processor, find_processor, image_token_id

__all__ = [
    "ROWS",
    "TASKS",
    "Batch",
    "Batches",
    "Calibration",
    "CalibrationLike",
    "Task",
    "batches_digest",
    "check_processor",
    "encode",
    "encode_text",
    "find_processor",
    "image_token_id",
    "is_tokenizer",
    "join_answer",
    "tokenise",
]
