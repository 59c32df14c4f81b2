"""FR-Spec: exact, low-latency text generation with large-vocabulary language models."""

from .errors import (
    ConversionError,
    DeviceError,
    EvaluationError,
    FrspecError,
    HubError,
    MemoryPlanError,
    ModelError,
    RankingError,
    RequestError,
)
from .generator import Generator, Result, TextStream, Timings
from .tree import Tree


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module 'frspec' has no attribute {name!r}")
    from importlib import metadata  # late: it takes as long as all the rest

    try:
        return metadata.version("frspec")
    except metadata.PackageNotFoundError:  # a source tree on the path
        return "(not installed)"


__all__ = [
    "ConversionError",
    "DeviceError",
    "EvaluationError",
    "FrspecError",
    "Generator",
    "HubError",
    "MemoryPlanError",
    "ModelError",
    "RankingError",
    "RequestError",
    "Result",
    "TextStream",
    "Timings",
    "Tree",
]
