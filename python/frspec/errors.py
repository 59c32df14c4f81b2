"""Every failure of frspec is one of these, with what was expected and what was found.

The C++ runtime throws the same types; the bindings translate them by name.
"""


class FrspecError(Exception):
    """Base of every error frspec raises on purpose."""


class ModelError(FrspecError):
    """A model or drafter folder cannot be used: file, tensor, shape, dtype or config."""


class RankingError(FrspecError):
    """A ranking cannot be used with this model (format, fingerprint, range, duplicates) or made
    (corpus, checkpoint, workers, a missing extra)."""


class ConversionError(FrspecError):
    """A checkpoint cannot be converted: unsupported, damaged or unsafe source."""


class HubError(FrspecError):
    """A model named by its hub id cannot be fetched."""


class EvaluationError(FrspecError):
    """An evaluation cannot go on: data file, results file, workers, disk, or a missing extra."""


class RequestError(FrspecError, ValueError):
    """A request cannot be served: prompt, token ids, sampling values or options."""


class MemoryPlanError(FrspecError, MemoryError):
    """The memory plan does not fit; the message names the numbers and what would fit."""


class DeviceError(FrspecError):
    """A device is absent or failed."""


def short(value: object) -> str:
    """A value as an error names it, of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def first_line(error: Exception) -> str:
    """The first line of an error, its type where the text says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
