"""Errors caused by a user's input. Each says what was asked, what was received, and what to do."""


class HippError(Exception):
    """Base class of the errors that hipp-ext raises."""

    def __str__(self) -> str:
        # A name from a damaged file may contain a lone surrogate, which cannot be encoded.
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
    """A folder of a model or run that is incomplete, damaged, of another format or another run."""


class RecipeError(HippError, ValueError):
    """A host's recipe whose parts conflict with each other."""


class CompressionError(HippError, RuntimeError):
    """Unusable gradients, options or saved states of the compressor, or ranks that disagree."""


class DataError(HippError, ValueError):
    """An evaluation data set that is missing or malformed."""


class ServerError(HippError, RuntimeError):
    """A server that cannot be reached, does not serve the model, or refuses what it is asked."""


class AttackError(HippError, ValueError):
    """Settings or inputs on which an attack cannot run, or would look weaker than it is."""


class OutputExistsError(HippError, FileExistsError):
    """The output path exists, and overwriting was not requested."""


class OutputBusyError(HippError, RuntimeError):
    """Another process is writing the same output."""


class WriteError(HippError, OSError):
    """A result that could not be written: the disk is full, or the folder is not writable."""


class MissingExtraError(HippError, ImportError):
    """A host library is not installed; the message names the extra to install."""

    def __init__(self, library: str, extra: str):
        super().__init__(
            f'{library} is not installed. Install it with: pip install "hipp-ext[{extra}]"'
        )
