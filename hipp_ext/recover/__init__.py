"""Fine-tuning of a pruned model on the user's data, with the dense model as the teacher.

model, dense, settings = load_pruned("./pruned"), load_pruned("./dense"), RecoverSettings(steps=400)
data = FileData("chats.jsonl", processor, holdout=0.02)
recover(model, data, settings, folder="./recovered.recover", teacher=dense)
"""

from hipp_ext.recover.data import DataSource, QuestionData, TestbedData
from hipp_ext.recover.file_data import FileData
from hipp_ext.recover.objectives import CrossEntropy, Distillation
from hipp_ext.recover.settings import RecoverResult, RecoverSettings
from hipp_ext.recover.teachers import ModelTeacher
from hipp_ext.recover.training import recover

__all__ = [
    "CrossEntropy",
    "DataSource",
    "Distillation",
    "FileData",
    "ModelTeacher",
    "QuestionData",
    "RecoverResult",
    "RecoverSettings",
    "TestbedData",
    "recover",
]
