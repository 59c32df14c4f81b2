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
