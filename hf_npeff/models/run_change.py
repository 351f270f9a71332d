"""What changed between two points of a training run, from a probe set that was analysed at both."""

from __future__ import annotations

from dataclasses import dataclass

from hf_npeff.config import ChangeRequest
from hf_npeff.data import Example
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.encoding.record import Encoded
from hf_npeff.fisher.predictions import Predictions, predict
from hf_npeff.models.fisher_model import FisherModel
from hf_npeff.pefs.store import PEFs
from hf_npeff.weights.change_report import ChangeReport
from hf_npeff.weights.explaining import Grown, Seen, Watched, explained_change


@dataclass(frozen=True)
class RunPoint:
    """One point of a run.

    Attributes:
        step: the number of optimizer steps so far.
        pefs: the PEFs of the probe set.
        decomposition: the decomposition of the PEFs.
        predictions: the predictions for the probe set.
    """

    step: int
    pefs: PEFs
    decomposition: Decomposition
    predictions: Predictions


def seen_at(
    analyzer: FisherModel, step: int, pefs: PEFs, decomposition: Decomposition, examples: list[Example], size: int
) -> RunPoint:
    """A point of a run, with the model's present predictions.

    Args:
        analyzer: an analyzer of the model as it is now.
        step: the number of optimizer steps so far.
        pefs: the PEFs of the probe set.
        decomposition: the decomposition of the PEFs.
        examples: the probe set, in the order of the PEFs.
        size: how many examples a forward pass takes.
    """
    with analyzer.forward_pass() as forward:
        return RunPoint(step, pefs, decomposition, predict(forward, examples, size))


def run_change(
    analyzer: FisherModel, first: RunPoint, last: RunPoint, examples: list[Example], resumed_at: int = 0
) -> ChangeReport:
    """What changed from the first point of a run to the last, through the components of the first.

    The weights of the first point are gone, so the report has nothing on the change itself: no cosines, no norm.

    Args:
        analyzer: an analyzer of the model.
        first: the first point.
        last: the last point, of the same examples.
        examples: the probe set, in the order of the PEFs.
        resumed_at: the step of the checkpoint from which the run was resumed; 0 if it was not.
    """
    encoded = Encoded.of(first.pefs.info)
    truth = [None] * len(examples) if encoded is None else analyzer.description.truth_of(examples, encoded)
    groups = {"all": list(range(len(examples)))}
    watched = Watched(examples, truth, groups, first.predictions, analyzer.description.in_words, 0)
    seen = Seen({1.0: last.predictions}, None, 0.0, [])
    grown = Grown(first.decomposition.explain(first.pefs)[0], first.decomposition.explain(last.pefs)[0], None, None)
    origin = {"method": "training", "model": first.pefs.info.get("model"), "after": f"step {last.step}"}
    origin["before"] = f"step {first.step}"
    request = ChangeRequest(steps=(), take_out=0)
    explained = explained_change(first.decomposition, first.pefs, None, watched, seen, grown, request, origin)
    if resumed_at:
        explained.notes.append(
            f"the run was resumed from the checkpoint of step {resumed_at}, and earlier models are not available, so "
            f"this report does not include changes up to step {first.step}"
        )
    return explained.report()
