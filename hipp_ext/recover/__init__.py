"""Fine-tuning of a pruned model, on one process or on several with compressed gradients.

model, settings = load_pruned("./pruned"), RecoverSettings(steps=400)
recover(model, TestbedData(processor), settings, folder="./recovered.recover")
"""

from hipp_ext.recover.data import DataSource, QuestionData, TestbedData
from hipp_ext.recover.training import RecoverResult, RecoverSettings, recover

__all__ = [
    "DataSource",
    "QuestionData",
    "RecoverResult",
    "RecoverSettings",
    "TestbedData",
    "recover",
]
