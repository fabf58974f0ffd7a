"""Recovery of a pruned model on the user's data, from labels or from the dense model.

model, dense, settings = load_pruned("./pruned"), load_pruned("./dense"), RecoverSettings(steps=400)
data = FileData("chats.jsonl", processor, holdout=0.02)
recover(model, data, settings, folder="./recovered.recover", teacher=dense)
"""

from hipp_ext.recover.cached_teacher import CachedTeacher, read_teacher
from hipp_ext.recover.data import DataSource, QuestionData, TestbedData
from hipp_ext.recover.distillation import Distillation
from hipp_ext.recover.file_data import FileData
from hipp_ext.recover.objectives import CrossEntropy, Objective
from hipp_ext.recover.precompute import precompute
from hipp_ext.recover.settings import RecoverResult, RecoverSettings
from hipp_ext.recover.teachers import ModelTeacher, Teacher
from hipp_ext.recover.training import recover

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
