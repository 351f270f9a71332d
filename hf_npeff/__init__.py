"""hf_npeff: which heuristics does a Hugging Face model use, on which inputs, and what if one is switched off?"""

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

from hf_npeff.analyzer import NPEFFAnalyzer
from hf_npeff.components import Component, Decomposition
from hf_npeff.config import DecompositionConfig, FisherConfig
from hf_npeff.decomposition.estimator import NPEFF
from hf_npeff.directions import ParameterDirection
from hf_npeff.errors import (
    CorruptStoreError,
    FormatVersionError,
    IncompatibleSketchError,
    NPEFFError,
    UnsupportedModelError,
)
from hf_npeff.fisher.distributions import OutputHead, Outputs
from hf_npeff.hub import list_decompositions
from hf_npeff.perturbation import PerturbationReport
from hf_npeff.store import PEFs

if TYPE_CHECKING:
    from hf_npeff.callback import NPEFFCallback

__all__ = [
    # settings
    "FisherConfig",
    "DecompositionConfig",
    # stages
    "NPEFFAnalyzer",
    "OutputHead",
    "Outputs",
    "PEFs",
    "NPEFF",
    "Decomposition",
    "Component",
    "ParameterDirection",
    "PerturbationReport",
    "NPEFFCallback",
    # the Hub
    "list_decompositions",
    # errors
    "NPEFFError",
    "IncompatibleSketchError",
    "UnsupportedModelError",
    "CorruptStoreError",
    "FormatVersionError",
]


def __getattr__(name: str) -> Any:
    if name == "NPEFFCallback":  # transformers' callbacks bring PEFT along
        from hf_npeff.callback import NPEFFCallback

        return NPEFFCallback
    raise AttributeError(f"module 'hf_npeff' has no attribute {name!r}")
