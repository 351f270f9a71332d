"""Protocols for objects of higher floors, so that imports run one way, including those for types.

A card describes a decomposition, a component reads its decomposition, and a page takes reports. The attributes that
they read are named here, so they need not import the classes, which are documented elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from hf_npeff.config import DecompositionConfig


class HasFingerprint(Protocol):
    """Rows, or what was made from them: `Decomposition`, `PEFs`."""

    @property
    def fingerprint(self) -> str:
        """Of the sketch."""


class HasDict(Protocol):
    """A result that can be written as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""


class TopExamplesLike(Protocol):
    """`hf_npeff.decomposition.component.TopExamples`."""

    @property
    def indices(self) -> Sequence[int]:
        """Their places among the analysed examples."""

    @property
    def coefficients(self) -> Sequence[float]:
        """W of each, descending."""

    @property
    def ids(self) -> Sequence[str]:
        """Ids of the examples."""

    @property
    def columns(self) -> Mapping[str, Sequence[Any]]:
        """{name: values} of everything kept."""


class ComponentLike(Protocol):
    """`hf_npeff.Component`."""

    @property
    def index(self) -> int:
        """Component number."""

    @property
    def name(self) -> str | None:
        """What a person called it."""

    @property
    def stability(self) -> float:
        """Agreement with other restarts."""

    @property
    def active_share(self) -> float:
        """Share of the examples on which it is active."""

    def top_examples(self, k: int = 10) -> TopExamplesLike:
        """The k examples with the largest coefficients."""


class DecompositionLike(Protocol):
    """`hf_npeff.Decomposition`."""

    @property
    def coefficients(self) -> Tensor:
        """W (n, r)."""

    @property
    def pseudo_fishers(self) -> Tensor:
        """G (r, d)."""

    @property
    def stability(self) -> Tensor:
        """Agreement of each component with other restarts (r,)."""

    @property
    def scales(self) -> Tensor | None:
        """What balanced rows were multiplied with (d,)."""

    @property
    def loss_history(self) -> list[float]:
        """Relative loss after the start and after every iteration."""

    @property
    def converged(self) -> bool:
        """Whether the solver stopped before its iteration limit."""

    @property
    def explained(self) -> float:
        """1 − relative loss."""

    @property
    def config(self) -> DecompositionConfig:
        """How it was made."""

    @property
    def info(self) -> Mapping[str, Any]:
        """What is known of the PEFs."""

    @property
    def example_ids(self) -> Sequence[str]:
        """Ids of the n examples."""

    @property
    def columns(self) -> Mapping[str, Sequence[Any]]:
        """{name: n values} kept beside the PEFs."""

    @property
    def text_column(self) -> str | None:
        """The column that shows an example to a person."""

    @property
    def texts(self) -> Sequence[Any] | None:
        """What shows each example to a person."""

    @property
    def names(self) -> Mapping[int, str]:
        """{component: name} given by people."""

    @property
    def evaluations(self) -> Mapping[int, Mapping[str, Any]]:
        """{component: measured perturbation}."""

    def associations(self, *, columns: Sequence[str] | None, texts: bool) -> HasDict:
        """What each component's examples have in common, in some of the columns."""

    def __len__(self) -> int:
        """The number of components."""

    def __iter__(self) -> Iterator[ComponentLike]:
        """The components in order."""


class PEFsLike(Protocol):
    """`hf_npeff.PEFs`."""

    @property
    def info(self) -> Mapping[str, Any]:
        """What config.json holds."""

    @property
    def columns(self) -> Mapping[str, Sequence[Any]]:
        """{name: n values} kept beside the rows."""

    @property
    def rank(self) -> int:
        """Rows of an example."""

    @property
    def dim(self) -> int:
        """Numbers in a row."""

    def __len__(self) -> int:
        """The number of examples."""


class ReportLike(Protocol):
    """`hf_npeff.PerturbationReport`."""

    def summary(self) -> dict[str, Any]:
        """What a decomposition and a card keep of it."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""


class TokenAlignmentLike(Protocol):
    """`hf_npeff.weights.token_alignments.TokenAlignment`."""

    @property
    def component(self) -> int:
        """Component number."""

    @property
    def example(self) -> int:
        """The example's position among the analysed ones."""

    @property
    def alignment(self) -> float:
        """N_ij."""

    @property
    def tokens(self) -> list[str] | None:
        """What stands at each position; None where the input is no text."""

    @property
    def contributions(self) -> list[float]:
        """The share of each position."""

    @property
    def unplaced(self) -> float:
        """The share of weights that are used at no position of the input."""
