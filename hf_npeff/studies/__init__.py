"""Studies of what a decomposition finds.

Each is one call that takes settings from `studies.settings` and returns a `StudyResult`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time a name is imported when it is first asked for, as those of hf_npeff are
    from hf_npeff.studies.ablations import read_grid, run_ablations
    from hf_npeff.studies.attributes import Attributes
    from hf_npeff.studies.comparison import fit_methods
    from hf_npeff.studies.detection import score_ratings
    from hf_npeff.studies.factors import run_factors
    from hf_npeff.studies.fair import run_fair
    from hf_npeff.studies.in_context import run_in_context
    from hf_npeff.studies.likelihood_rater import rate_by_likelihood
    from hf_npeff.studies.mechanisms import run_mechanisms
    from hf_npeff.studies.pair_study import run_minimal_pairs
    from hf_npeff.studies.planted import run_planted
    from hf_npeff.studies.prompted import load_task, make_prompts, run_task
    from hf_npeff.studies.raters import InferenceChat, LocalChat, rate
    from hf_npeff.studies.ratings import RatingStudy
    from hf_npeff.studies.scripted_rater import rate_by_words
    from hf_npeff.studies.selectivity import run_selectivity

_MODULE_OF = {
    "Attributes": "attributes",
    "InferenceChat": "raters",
    "LocalChat": "raters",
    "RatingStudy": "ratings",
    "fit_methods": "comparison",
    "load_task": "prompted",
    "make_prompts": "prompted",
    "rate": "raters",
    "rate_by_likelihood": "likelihood_rater",
    "rate_by_words": "scripted_rater",
    "read_grid": "ablations",
    "run_ablations": "ablations",
    "run_factors": "factors",
    "run_fair": "fair",
    "run_in_context": "in_context",
    "run_mechanisms": "mechanisms",
    "run_minimal_pairs": "pair_study",
    "run_planted": "planted",
    "run_selectivity": "selectivity",
    "run_task": "prompted",
    "score_ratings": "detection",
}
__all__ = [
    "Attributes",
    "InferenceChat",
    "LocalChat",
    "RatingStudy",
    "fit_methods",
    "load_task",
    "make_prompts",
    "rate",
    "rate_by_likelihood",
    "rate_by_words",
    "read_grid",
    "run_ablations",
    "run_factors",
    "run_fair",
    "run_in_context",
    "run_mechanisms",
    "run_minimal_pairs",
    "run_planted",
    "run_selectivity",
    "run_task",
    "score_ratings",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'hf_npeff.studies' has no attribute {name!r}")
        return getattr(import_module(f"hf_npeff.studies.{_MODULE_OF[name]}"), name)
