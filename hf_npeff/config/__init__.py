"""Settings of an analysis: frozen dataclasses, the only place that defines defaults.

`FisherConfig` and `DecompositionConfig` are saved with their results and round-trip through JSON. The `…Request`
classes hold the arguments of one method of the analyzer. Methods and commands read their defaults here
(tests/test_defaults.py).
"""

from hf_npeff.config.checks import check_choice, check_integer, check_positive, check_ridge, check_scale, is_count
from hf_npeff.config.choices import (
    BATCH_SIZE,
    GRAM_LIMIT,
    INTERVAL,
    NO_OPTION,
    SHADED,
    Balance,
    LiftForm,
    LiftMethod,
    OnError,
    OutputFactor,
    Positions,
    Precision,
    Quantisation,
    Ridge,
    SketchKind,
    Solver,
    SparseSolver,
    SpectralMetric,
    StorageDtype,
    Towards,
)
from hf_npeff.config.kept import DecompositionConfig, FisherConfig
from hf_npeff.config.measurements import (
    AssociationRequest,
    ChangeRequest,
    MeasureRequest,
    OffTargetRequest,
    PerturbationRequest,
)
from hf_npeff.config.requests import ComputeRequest, EditRequest, LiftRequest, SpareRequest

__all__ = [
    "AssociationRequest",
    "BATCH_SIZE",
    "Balance",
    "ChangeRequest",
    "ComputeRequest",
    "DecompositionConfig",
    "EditRequest",
    "FisherConfig",
    "GRAM_LIMIT",
    "INTERVAL",
    "LiftForm",
    "LiftMethod",
    "LiftRequest",
    "MeasureRequest",
    "NO_OPTION",
    "OffTargetRequest",
    "OnError",
    "OutputFactor",
    "PerturbationRequest",
    "Positions",
    "Precision",
    "Quantisation",
    "Ridge",
    "SHADED",
    "SketchKind",
    "Solver",
    "SpareRequest",
    "SparseSolver",
    "SpectralMetric",
    "StorageDtype",
    "Towards",
    "check_choice",
    "check_integer",
    "check_positive",
    "check_ridge",
    "check_scale",
    "is_count",
]
