"""Fine-tuning a pruned model back to what it knew, on one process or on several with compressed gradients.

recover(load_pruned("./pruned"), TestbedLessons(processor), RecoverSettings(steps=400), folder="./recovered.recover")
"""

from hipp_ext.recover.lessons import Lessons, QuestionLessons, TestbedLessons
from hipp_ext.recover.training import RecoverResult, RecoverSettings, recover

__all__ = [
    "Lessons",
    "QuestionLessons",
    "RecoverResult",
    "RecoverSettings",
    "TestbedLessons",
    "recover",
]
