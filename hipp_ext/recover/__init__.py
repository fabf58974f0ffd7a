"""Recovery of a pruned model, from labels or from the dense model, on one process or several.

model, settings = load_pruned("./pruned"), RecoverSettings(steps=400)
recover(model, TestbedData(processor), settings, folder="./recovered.recover")
"""

from hipp_ext.recover.cached_teacher import CachedTeacher, read_teacher
from hipp_ext.recover.data import DataSource, QuestionData, TestbedData
from hipp_ext.recover.file_data import FileData
from hipp_ext.recover.objectives import CrossEntropy, Distillation, Objective
from hipp_ext.recover.precompute import precompute
from hipp_ext.recover.teachers import ModelTeacher, Teacher
from hipp_ext.recover.training import RecoverResult, RecoverSettings, recover

__all__ = [
    "CachedTeacher",
    "CrossEntropy",
    "DataSource",
    "Distillation",
    "FileData",
    "ModelTeacher",
    "Objective",
    "QuestionData",
    "RecoverResult",
    "RecoverSettings",
    "Teacher",
    "TestbedData",
    "precompute",
    "read_teacher",
    "recover",
]
