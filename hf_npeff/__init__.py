"""hf_npeff: which heuristics does a Hugging Face model use, on which inputs, and what if one is switched off?"""

__version__ = "0.2.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see; at run time a name is imported when it is first asked for
    from hf_npeff.analyzer import NPEFFAnalyzer
    from hf_npeff.callback import NPEFFCallback
    from hf_npeff.config import DecompositionConfig, FisherConfig
    from hf_npeff.decomposition.component import Component
    from hf_npeff.decomposition.decomposition import Decomposition
    from hf_npeff.decomposition.estimator import NPEFF
    from hf_npeff.errors import (
        CorruptStoreError,
        FormatVersionError,
        IncompatibleSketchError,
        IncompatibleWeightsError,
        NPEFFError,
        UnsupportedModelError,
    )
    from hf_npeff.fisher.outputs import OutputHead, Outputs
    from hf_npeff.pefs.store import PEFs
    from hf_npeff.sharing.hub import list_decompositions
    from hf_npeff.weights.adapters import Adapter
    from hf_npeff.weights.change_report import ChangeReport
    from hf_npeff.weights.directions import ParameterDirection
    from hf_npeff.weights.measurement import Measurement
    from hf_npeff.weights.off_target import OffTarget
    from hf_npeff.weights.perturbation import PerturbationReport

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
    "Adapter",
    "PerturbationReport",
    "Measurement",
    "OffTarget",
    "ChangeReport",
    "NPEFFCallback",
    # the Hub
    "list_decompositions",
    # errors
    "NPEFFError",
    "IncompatibleSketchError",
    "IncompatibleWeightsError",
    "UnsupportedModelError",
    "CorruptStoreError",
    "FormatVersionError",
]

# Importing torch and transformers takes seconds, which `hf-npeff --help` and tab completion should not.
_MODULE_OF = {
    "ChangeReport": "weights.change_report",
    "Adapter": "weights.adapters",
    "Component": "decomposition.component",
    "CorruptStoreError": "errors",
    "Decomposition": "decomposition.decomposition",
    "DecompositionConfig": "config",
    "FisherConfig": "config",
    "FormatVersionError": "errors",
    "IncompatibleSketchError": "errors",
    "IncompatibleWeightsError": "errors",
    "Measurement": "weights.measurement",
    "NPEFF": "decomposition.estimator",
    "NPEFFAnalyzer": "analyzer",
    "NPEFFCallback": "callback",
    "NPEFFError": "errors",
    "OffTarget": "weights.off_target",
    "OutputHead": "fisher.outputs",
    "Outputs": "fisher.outputs",
    "PEFs": "pefs.store",
    "ParameterDirection": "weights.directions",
    "PerturbationReport": "weights.perturbation",
    "UnsupportedModelError": "errors",
    "list_decompositions": "sharing.hub",
}

if not TYPE_CHECKING:  # else a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'hf_npeff' has no attribute {name!r}")
        value = getattr(import_module(f"hf_npeff.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
