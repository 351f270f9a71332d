"""Why a method finds an attribute or misses it: supervised probes, and the same features read in other ways.

An unsupervised method can miss an attribute for three reasons: the representation that it works on lacks the attribute,
its features together lack it, or no single feature is about it. Logistic regressions show which it is: one on hidden
states or PEFs, and one on all coefficients of a method, are compared with the best single feature.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from hf_npeff.baselines.activations import activation_kmeans
from hf_npeff.baselines.method import MethodResult
from hf_npeff.baselines.row_dictionaries import coordinates, pef_inner_products
from hf_npeff.decomposition.decomposition import Decomposition
from hf_npeff.extras import load
from hf_npeff.pefs.store import PEFs
from hf_npeff.studies.attributes import Attributes
from hf_npeff.studies.factors import FactorsConfig, first_half, run_factors
from hf_npeff.studies.measures import auroc
from hf_npeff.studies.result import markdown, number

_FOLDS = 3
"""The number of folds of cross-validation. Chosen: an attribute of a dozen examples can still be split into so many."""
_PENALTIES = (1.0, 10.0, 100.0)
"""The values of scikit-learn's C, for features of unit size; cross-validation chooses one. Chosen: two decades of weak
penalties, since there are few features compared with examples."""


def linear_probes(features: Tensor, attributes: Attributes, *, choose: Tensor) -> dict[str, float]:
    """The AUROC of a logistic regression for each attribute.

    Features are centred and scaled to a mean squared norm of 1. The regressions are fitted on the examples in `choose`,
    where three-fold cross-validation chooses their penalties; the AUROC is measured on the other examples.

    Args:
        features: (n, m).
        attributes: the attributes of the n examples. An attribute is left out if fewer than 3 examples of `choose` have
            it or lack it, or if all other examples have it or all lack it.
        choose: (n,) bool.

    Raises:
        ValueError: if features, attributes and `choose` have different numbers of examples.
        ModuleNotFoundError: if scikit-learn is not installed.
    """
    exceptions, linear, selection = (
        load(f"sklearn.{name}", "a probe") for name in ("exceptions", "linear_model", "model_selection")
    )
    if not len(features) == len(attributes.values) == len(choose):
        raise ValueError(
            f"the features have {len(features)} examples, the attributes {len(attributes.values)} and `choose` "
            f"{len(choose)}"
        )
    X = features.double() - features[choose].double().mean(0)
    X = coordinates(X @ X.T) if X.shape[1] > len(X) else X
    X = X / X[choose].square().sum(1).mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    scores = {}
    for a, name in enumerate(attributes.names):
        values = attributes.values[:, a]
        here, there = choose & ~values.isnan(), ~choose & ~values.isnan()
        counts = [int((values[part] == v).sum()) for part in (here, there) for v in (0, 1)]
        if min(counts[:2]) < _FOLDS or min(counts[2:]) < 1:
            continue
        probe = selection.GridSearchCV(
            # Five times the default, because a large C needs more iterations
            linear.LogisticRegression(max_iter=500),
            {"C": _PENALTIES},
            scoring="roc_auc",
            cv=_FOLDS,
        )
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", exceptions.ConvergenceWarning
            )  # this happens for the weakest penalties only, and they are rarely chosen
            probe.fit(X[here].numpy(), (values[here] == 1).numpy())
        scores[name] = auroc(torch.from_numpy(probe.decision_function(X[there].numpy())), values[there] == 1)
    return scores


def diagnose(
    states: Tensor,
    pefs: PEFs,
    decomposition: Decomposition,
    attributes: Attributes,
    config: FactorsConfig | None = None,
    *,
    probed: Mapping[str, Tensor] | None = None,
    n_restarts: int = 4,
) -> dict[str, dict[str, float]]:
    """The AUROC of each attribute, for the best single feature of several kinds and for supervised probes.

    There are two kinds of features. Those of k-means, on hidden states and on PEFs (points whose inner products are
    those of the PEFs), are read as cosines and as assignments. The components of a decomposition are read as
    coefficients and as alignments ‖A_i g_j‖². The probes see hidden states, PEFs, the cosines and the coefficients.

    Args:
        states: hidden states (n, h).
        pefs: the PEFs of the same examples.
        decomposition: the decomposition of these PEFs; its number of components is that of the clusters.
        attributes: the attributes of the examples.
        config: the settings of the measurement, as for `run_factors`.
        probed: {name: (n, m)}, more representations to probe.
        n_restarts: the number of restarts of k-means.

    Returns:
        {what is read: {attribute: AUROC}}.

    Raises:
        ValueError: if the features, the PEFs and the attributes have different numbers of examples.
        ModuleNotFoundError: if scikit-learn is not installed.
    """
    config = config or FactorsConfig()
    r = len(decomposition)
    points = coordinates(pef_inner_products(pefs.factors)).float()
    W, N = decomposition.explain(pefs)
    cosines = activation_kmeans(states, r, n_restarts=n_restarts).coefficients
    hard = torch.nn.functional.one_hot(cosines.argmax(1), r).float()
    of_pefs = activation_kmeans(points, r, n_restarts=n_restarts).coefficients
    single = {
        "k-means on activations, cosines": cosines,
        "k-means on activations, assignments": hard,
        "k-means on PEFs, cosines": of_pefs,
        "NPEFF, coefficients W": W.float(),
        "NPEFF, alignments ‖A g‖²": N.float(),
    }
    methods = [MethodResult(name, coefficients) for name, coefficients in single.items()]
    measured = run_factors(methods, attributes, config)
    rows = {f"best of {r}: {row.method}": {s.attribute: s.auroc for s in row.attributes} for row in measured.methods}
    kept = {s.attribute for s in measured.methods[0].attributes}
    trained = {"activations": states, "PEFs": points, f"{r} cosines of k-means": cosines, f"{r} coefficients W": W}
    for name, features in {**trained, **(probed or {})}.items():
        coefficients = linear_probes(features, attributes, choose=first_half(len(states), config.seed))
        rows[f"probe of {name}"] = {attribute: value for attribute, value in coefficients.items() if attribute in kept}
    return rows


def by_kind(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A table with a row for each thing that is read: the mean AUROC over all attributes, and over those of each kind.

    The kind of an attribute is the part of its name before "=".
    """
    names = dict.fromkeys(attribute for scores in rows.values() for attribute in scores)
    kinds = list(dict.fromkeys(name.split("=")[0] for name in names))
    body = []
    for label, scores in rows.items():
        parts = [[v for a, v in scores.items() if kind in (None, a.split("=")[0])] for kind in (None, *kinds)]
        body.append([label, *(number(sum(part) / len(part) if part else None) for part in parts)])
    counts = [f"{kind} ({sum(name.split('=')[0] == kind for name in names)})" for kind in kinds]
    return markdown(["AUROC", f"mean ({len(names)})", *counts], body)


def over_data_sets(diagnoses: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A table of {data set: what `diagnose` returned}: mean AUROC over the attributes for each thing that is read."""
    labels = dict.fromkeys(label for rows in diagnoses.values() for label in rows)
    body = []
    for label in labels:
        by_data_set = [list(rows.get(label, {}).values()) for rows in diagnoses.values()]
        body.append([label, *(number(sum(scores) / len(scores) if scores else None) for scores in by_data_set)])
    return markdown(["mean AUROC", *(name.replace("_", " ") for name in diagnoses)], body)
