"""Errors that a user's input can cause. Each says what was asked, what came in, and what to do."""


class HippError(Exception):
    """Base of every error that hipp-ext raises on purpose."""

    def __str__(self) -> str:
        # A name from a damaged file may hold half a character (a lone surrogate), which no terminal or file takes.
        return super().__str__().encode(errors="replace").decode()


class PreferenceError(HippError, ValueError):
    """A preference that is not a point on the simplex (negative, NaN, all zero)."""


class BudgetError(HippError, ValueError):
    """A budget that no allocation within the bounds can meet."""


class PlanError(HippError, ValueError):
    """A plan that is malformed, or that belongs to another model."""


class UnsupportedModelError(HippError, TypeError):
    """A model whose groups cannot be mapped; the message lists what was found."""


class CalibrationError(HippError, ValueError):
    """Calibration data that is missing, empty, or does not fit the model or processor."""


class CheckpointError(HippError, ValueError):
    """A model folder that is incomplete, damaged, or of an unknown format."""


class RecipeError(HippError, ValueError):
    """A host's recipe whose parts would undo each other, or cannot be carried out together."""


class CompressionError(HippError, RuntimeError):
    """Gradients, options or saved state that the compressor cannot work with, or ranks that do not agree."""


class DataError(HippError, ValueError):
    """An evaluation data set that is missing or malformed."""


class AttackError(HippError, ValueError):
    """Settings or inputs that an adversarial attack cannot run on, or on which it would look weaker than it is."""


class OutputExistsError(HippError, FileExistsError):
    """The output path exists, and overwriting it was not asked for."""


class OutputBusyError(HippError, RuntimeError):
    """Another process is writing the same output at this moment."""


class WriteError(HippError, OSError):
    """A result that could not be written: the disk is full, or the folder is not writable."""


class MissingExtraError(HippError, ImportError):
    """A host library is not installed; the message names the extra to install."""

    def __init__(self, library: str, extra: str):
        super().__init__(
            f'{library} is not installed. Install it with: pip install "hipp-ext[{extra}]"'
        )
