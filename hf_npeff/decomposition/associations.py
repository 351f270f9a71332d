"""What a component's examples have in common: words and column values that they have more often than the others.

A feature is something that an example has or does not have: a word, two or three words in a row, the beginning or end
of its text, a value of a column. If m of n examples belong to a component, K of n have a feature, and k have both, then
for randomly chosen examples the hypergeometric tail is P(X ≥ k) = Σ_{x≥k} C(K, x) C(n − K, m − x) / C(n, m). Thousands
of features are tried on every component, so a tail is compared with the smallest tails, over all features and
components, of shuffled examples (Westfall and Young 1993, single step): the corrected p-value counts the shuffles with
as low a tail.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_npeff.config import AssociationRequest
from hf_npeff.decomposition.component import active_examples
from hf_npeff.decomposition.features import Feature, Kind, features_of
from hf_npeff.encoding.columns import correctness, described_by
from hf_npeff.encoding.record import Encoded, shown_columns

_SHOWN = 40
"""The most characters of a feature in a label. Chosen: three features fit into a line."""


@dataclass(frozen=True)
class Association:
    """A feature that a component's examples have more often than the others.

    Attributes:
        kind: "word", "words" in a row, "begins", "ends" (of a text), or "column".
        feature: the feature in words: the words themselves, or "column = value".
        count: how many of the component's examples have it.
        share: their share of the component's examples.
        rest: the share of the other examples that have it.
        log_p: natural logarithm of the hypergeometric tail probability, for this feature alone.
        corrected: the p-value, corrected by shuffled examples for all features and all components.
        same: other features that exactly the same examples have.
    """

    kind: Kind
    feature: str
    count: int
    share: float
    rest: float
    log_p: float
    corrected: float
    same: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComponentAssociations:
    """What one component's examples have in common.

    Attributes:
        component: the number of the component.
        examples: how many examples count as its own: those on which it is active, or the stronger half of these if it
            is active on most examples.
        associations: the associations, the most certain first; empty if none is certain enough.
        accuracy: share of right predictions on its examples and on the others; None if there are no labels.
        error: for a regression, mean |prediction − label| on its examples and on the others.
    """

    component: int
    examples: int
    associations: list[Association] = field(default_factory=list)
    accuracy: tuple[float, float] | None = None
    error: tuple[float, float] | None = None

    def __repr__(self) -> str:
        return f"ComponentAssociations({self.component}, {self.label!r}, {len(self.associations)} associations)"

    @property
    def label(self) -> str | None:
        """A short automatic label made of the first associations; None if there are none.

        It has the first association, and the next one that shares fewer than half of its words with the first.
        """
        if not self.associations:
            return None
        first = self.associations[0]
        words = set(first.feature.casefold().split())
        for other in self.associations[1:]:
            theirs = set(other.feature.casefold().split())
            if other.kind != first.kind or 2 * len(words & theirs) < len(theirs):
                return f"{_short(first)}, {_short(other)}"
        return _short(first)


def _short(association: Association) -> str:
    text = " ".join(association.feature.split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


@dataclass(frozen=True)
class Associations(Sequence[ComponentAssociations]):
    """What the examples of every component have in common, with a `ComponentAssociations` for each.

    Attributes:
        components: the `ComponentAssociations` of each component, in order.
        groups: {feature: the components that are associated with it}, for features of several components.
        n: the number of examples.
        features: how many features were tried.
        level: the largest corrected p-value at which an association counts.
        shuffles: how often the examples were shuffled.

    Example:
        >>> associations = decomposition.associations()
        >>> len(associations) == len(decomposition)
        True
        >>> associations[0].accuracy is None or 0 <= associations[0].accuracy[0] <= 1
        True
        >>> sorted(associations.to_dict())
        ['components', 'features', 'groups', 'level', 'n', 'shuffles']
    """

    components: list[ComponentAssociations]
    groups: dict[str, list[int]]
    n: int
    features: int
    level: float
    shuffles: int

    def __getitem__(self, j: Any) -> Any:
        return self.components[j]

    def __len__(self) -> int:
        return len(self.components)

    def __iter__(self) -> Iterator[ComponentAssociations]:
        return iter(self.components)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; each component with its automatic label."""
        values = asdict(self)
        for component, content in zip(self.components, values["components"], strict=True):
            content["automatic_label"] = component.label
        return values

    def __repr__(self) -> str:
        some = sum(bool(component.associations) for component in self.components)
        return f"Associations({some} of {len(self)} components, {self.features:,} features of {self.n:,} examples)"

    def _repr_html_(self) -> str:
        from hf_npeff.report.notebook import of_associations

        return of_associations(self)


def associate(
    coefficients: Tensor,
    columns: Mapping[str, Sequence[Any]],
    info: Mapping[str, Any],
    request: AssociationRequest,
    *,
    texts: bool = True,
) -> Associations:
    """What the examples of each component have in common.

    Args:
        coefficients: W (n, r).
        columns: {name: n values}, the columns to use.
        info: the `info` of the decomposition, which says which columns are the texts.
        request: the settings.
        texts: whether to use texts.

    Raises:
        ValueError: if `texts` is true and no texts were kept, or there are no columns.
    """
    chosen = _drawn(len(coefficients), request)
    W = coefficients[chosen]
    kept = {name: [values[i] for i in chosen] for name, values in columns.items()}
    features = features_of(kept, info, texts=texts)
    members = _members(W)
    tables = _associations_of(features, members, request)
    right, differences = _right(kept, info), _differences(kept, info)
    components = [
        ComponentAssociations(
            j, int(members[:, j].sum()), tables[j], _inside_and_out(right, members[:, j]),
            None if right is not None else _inside_and_out(differences, members[:, j]),
        )
        for j in range(W.shape[1])
    ]  # fmt: skip
    return Associations(components, _groups(components), len(chosen), len(features), request.level, request.shuffles)


def in_common(
    members: Tensor,
    columns: Mapping[str, Sequence[Any]],
    info: Mapping[str, Any],
    request: AssociationRequest,
) -> list[list[Association]]:
    """What groups of examples have in common, compared with the other examples: words, if texts were kept, and columns.

    Args:
        members: (n, m) bool, m groups.
        columns: {name: n values}.
        info: the `info` of the decomposition.
        request: the settings; p-values are corrected for all groups together.

    Returns:
        The associations of every group, the most certain first; empty if neither texts nor columns were kept.
    """
    if not described_by(columns):
        return [[] for _ in range(members.shape[1])]
    chosen = _drawn(len(members), request)
    kept = {name: [values[i] for i in chosen] for name, values in columns.items()}
    features = features_of(kept, info, texts=bool(shown_columns(columns, info)))
    return _associations_of(features, members[chosen], request)


def _drawn(n: int, request: AssociationRequest) -> list[int]:
    if n <= request.max_examples:
        return list(range(n))
    generator = torch.Generator().manual_seed(request.seed)
    drawn: list[int] = torch.randperm(n, generator=generator)[: request.max_examples].sort().values.tolist()
    return drawn


def _members(W: Tensor) -> Tensor:
    """(n, r) bool: a component's own examples: those on which it is active, or the stronger half if these are most."""
    active = active_examples(W)
    share = W / W.sum(1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
    strong = active & (share >= share.median(0).values)
    return torch.where(active.sum(0) * 2 > len(W), strong, active)


# Tail probabilities


class _Tails(NamedTuple):
    """The tail probabilities of features in components.

    Attributes:
        sizes: (M,) the number of examples with each feature.
        counts: (M, r) how many of them are in each component.
        observed: (M, r) log-probabilities of this count or more.
        corrected: (M, r) p-values, corrected for all features and components.
    """

    sizes: Tensor
    counts: Tensor
    observed: Tensor
    corrected: Tensor


def _associations_of(
    features: Sequence[Feature], members: Tensor, request: AssociationRequest
) -> list[list[Association]]:
    """The associations of every component.

    Args:
        features: the M features.
        members: (n, r) bool.
        request: how many associations to keep, and how certain they have to be.
    """
    n, r = members.shape
    if not features:
        return [[] for _ in range(r)]
    sizes, counts, observed, corrected = _tails_of(features, members, request)
    tables = []
    for j in range(r):
        order = torch.argsort(observed[:, j], stable=True)[: request.top].tolist()
        m = int(members[:, j].sum())
        tables.append(
            [
                Association(
                    features[f].kind,
                    features[f].text,
                    k := int(counts[f, j]),
                    k / m,
                    (int(sizes[f]) - k) / max(n - m, 1),
                    float(observed[f, j]),
                    float(corrected[f, j]),
                    features[f].same,
                )
                for f in order
                if float(corrected[f, j]) <= request.level
            ]
        )
    return tables


def _tails_of(features: Sequence[Feature], members: Tensor, request: AssociationRequest) -> _Tails:
    """Tails of the hypergeometric distribution, and the lowest tails of shuffled examples."""
    (n, r), M = members.shape, len(features)
    sizes = torch.tensor([len(f.where) for f in features])
    rows = torch.repeat_interleave(torch.arange(M), sizes)
    places = torch.tensor([i for f in features for i in f.where])
    X = torch.sparse_coo_tensor(
        torch.stack([rows, places]), torch.ones(len(rows)), (M, n), check_invariants=True
    ).coalesce()
    generator = torch.Generator().manual_seed(request.seed)
    orders = torch.stack([torch.randperm(n, generator=generator) for _ in range(request.shuffles)])
    distinct, which = sizes.unique(return_inverse=True)
    ordered, lengths = sizes.unique_consecutive(return_counts=True)  # features come sorted by how many have them
    runs, which_run = lengths.tolist(), torch.searchsorted(distinct, ordered)
    observed, counts = torch.empty(M, r, dtype=torch.float64), torch.empty(M, r, dtype=torch.long)
    lowest = torch.full((request.shuffles,), math.inf, dtype=torch.float64)
    for j in range(r):
        y = members[:, j].float()
        tails = log_tails(n, int(y.sum()), distinct)
        counts[:, j] = torch.sparse.mm(X, y[:, None])[:, 0].round().long()
        observed[:, j] = tails[which, counts[:, j]]
        shuffled = torch.sparse.mm(X, y[orders].T.contiguous())  # (M, shuffles)
        # Of features that equally many examples have, the one with the most in the component has the lowest tail.
        most = torch.stack([part.amax(0) for part in shuffled.split(runs)]).round().long()
        lowest = torch.minimum(lowest, tails[which_run[:, None], most].amin(0))
    lowest = lowest.sort().values
    # A rounding error of the logarithms must not break a tie.
    reached = torch.searchsorted(lowest, observed + 1e-9, right=True)
    return _Tails(sizes, counts, observed, (1 + reached) / (1 + request.shuffles))


def log_tails(n: int, m: int, sizes: Tensor) -> Tensor:
    """Log P(X ≥ k) for k = 0 … of the hypergeometric distribution, a row for every K in `sizes`.

    Args:
        n: the number of examples.
        m: how many are drawn.
        sizes: K, how many of the n have a feature.

    Returns:
        (len(sizes), largest k + 1), float64; −inf for impossible counts.
    """
    K = sizes.double()[:, None]
    k = torch.arange(min(m, int(sizes.max())) + 1, dtype=torch.float64)[None, :]

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.lgamma(a + 1) - torch.lgamma(b + 1) - torch.lgamma(a - b + 1)

    possible = (k <= K) & (m - k <= n - K)
    whole = choose(torch.tensor(float(n), dtype=torch.float64), torch.tensor(float(m), dtype=torch.float64))
    inside = torch.where(possible, k, torch.minimum(K, torch.tensor(float(m), dtype=torch.float64)))
    mass = torch.where(possible, choose(K, inside) + choose(n - K, m - inside) - whole, -math.inf)
    return torch.logcumsumexp(mass.flip(1), 1).flip(1).clamp_max(0.0)


def _groups(components: Sequence[ComponentAssociations]) -> dict[str, list[int]]:
    shared: dict[str, list[int]] = defaultdict(list)
    for component in components:
        for association in component.associations:
            shared[association.feature].append(component.component)
    several = {feature: numbers for feature, numbers in shared.items() if len(numbers) > 1}
    return dict(sorted(several.items(), key=lambda item: (-len(item[1]), item[0])))


# Whether predictions are right


def _right(columns: Mapping[str, Sequence[Any]], info: Mapping[str, Any]) -> Tensor | None:
    """(n,) 1 for a right prediction, 0 for a wrong one, NaN if it is not known."""
    correct = correctness(columns, info.get("label_names"), info)
    if correct is None or correct.data is None:
        return None
    value = {"right": 1.0, "wrong": 0.0, None: math.nan}
    return torch.tensor([value[correct.values[code]] for code in correct.data.tolist()], dtype=torch.float64)


def _differences(columns: Mapping[str, Sequence[Any]], info: Mapping[str, Any]) -> Tensor | None:
    """(n,) |prediction − label| of a regression, NaN if one is missing; None if they are not numbers."""
    record = Encoded.of(info)
    name = None if record is None else record.label_column
    predicted, true = columns.get("prediction"), columns.get(name or "label")
    if predicted is None or true is None or info.get("task") != "sequence-classification":
        return None
    try:
        pairs = [(math.nan if a is None else float(a), math.nan if b is None else float(b)) for a, b in
                 zip(predicted, true, strict=True)]  # fmt: skip
    except (TypeError, ValueError):
        return None
    return torch.tensor([abs(a - b) for a, b in pairs], dtype=torch.float64)


def _inside_and_out(values: Tensor | None, member: Tensor) -> tuple[float, float] | None:
    """Means over a component's examples and over the others, if both are known."""
    if values is None:
        return None
    known = ~values.isnan()
    if not bool((known & member).any()) or not bool((known & ~member).any()):
        return None
    return float(values[known & member].mean()), float(values[known & ~member].mean())
