"""Hidden states of a layer at one position of every example: read, edited, and clustered or factored as sanity rows."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_npeff.analyzer import NPEFFAnalyzer
from hf_npeff.baselines.method import MethodResult, check_enough
from hf_npeff.errors import UnsupportedModelError
from hf_npeff.extras import load

Position = Literal["first", "last"]
Edit = Callable[[Tensor], Tensor]
"""Hidden states (B, h) → what takes their place (B, h)."""


class Site:
    """Where hidden states are read and edited: the output of one layer at one position.

    Args:
        model: any transformers model of one stack of layers.
        layer: number of a layer, negative ones from the end, or the full name of a module.
        position: "last" (the last token that is not padding) or "first" (where encoders put their [CLS]).

    Raises:
        ValueError: if the layer or the position does not exist.
        UnsupportedModelError: if the model has no single stack of layers, so that the module must be named.

    Example:
        >>> site = Site(model, layer=-1, position="last")
        >>> ids = torch.tensor([[9, 10, 11]])
        >>> with site.editing(lambda state: 0 * state):
        ...     silenced = model(ids).logits
    """

    def __init__(self, model: nn.Module, layer: int | str = -1, position: Position = "last"):
        if position not in ("first", "last"):
            raise ValueError(f"position must be 'first' or 'last', but it is {position!r}")
        self.model = model
        self.position = position
        self.name = layer if isinstance(layer, str) else _layer_name(model, layer)
        modules = dict(model.named_modules())
        if self.name not in modules:
            raise ValueError(f"the model has no module named {self.name!r}")
        self.module = modules[self.name]

    def __repr__(self) -> str:
        return f"Site({self.name!r}, {self.position!r})"

    @contextlib.contextmanager
    def editing(self, edit: Edit) -> Iterator[None]:
        """The model with the hidden states at this site replaced, inside `with`; hooks are gone afterwards."""
        masks: list[Tensor | None] = [None]

        def before(module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
            masks[0] = named.get("attention_mask")

        def after(module: nn.Module, arguments: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            where = self._index(hidden, masks[0])
            rows = torch.arange(len(hidden), device=hidden.device)
            old = hidden[rows, where]
            new = edit(old).to(hidden.dtype)
            if new is old:
                return output
            hidden = hidden.clone()
            hidden[rows, where] = new
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handles = [
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.module.register_forward_hook(after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _index(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        B, T = hidden.shape[:2]
        if hidden.dim() != 3:
            raise UnsupportedModelError(
                f"the output of {self.name} has the shape {tuple(hidden.shape)}, not (examples, positions, h)"
            )
        if self.position == "first":
            return torch.zeros(B, dtype=torch.long, device=hidden.device)
        if mask is None or mask.shape != (B, T):
            return torch.full((B,), T - 1, device=hidden.device)
        steps = torch.arange(T, device=hidden.device)
        return torch.where(mask.to(hidden.device).bool(), steps, 0).amax(1)


def _layer_name(model: nn.Module, layer: int) -> str:
    config: Any = getattr(model, "config", None)
    depth: int = getattr(config.get_text_config(), "num_hidden_layers", 0) if config is not None else 0
    stacks = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth > 0]
    stacks = [n for n in stacks if not any(n.startswith(f"{other}.") for other in stacks if other != n)]
    if len(stacks) != 1:
        raise UnsupportedModelError(
            f"the model has {len(stacks)} stacks of layers ({', '.join(stacks) or 'none known'}); pass the full name "
            "of a module as `layer`"
        )
    if not -depth <= layer < depth:
        raise ValueError(f"the model has {depth} layers, numbered from 0; layer {layer} does not exist")
    return f"{stacks[0]}.{layer % depth}"


def hidden_states(analyzer: NPEFFAnalyzer, dataset: Any, site: Site, *, batch_size: int = 16) -> Tensor:
    """Hidden states (n, h) at a site, float32 on the CPU, in the data set's order.

    Raises:
        ValueError: if the data is empty or cannot be encoded.

    Example:
        >>> hidden_states(analyzer, dataset, Site(model, layer=0)).shape
        torch.Size([24, 16])
    """
    return hidden_states_at(analyzer, dataset, [site], batch_size=batch_size)[0]


def hidden_states_at(
    analyzer: NPEFFAnalyzer, dataset: Any, sites: Sequence[Site], *, batch_size: int = 16
) -> list[Tensor]:
    """Hidden states (n, h) at several sites, from the same forward passes; see `hidden_states`.

    Raises:
        ValueError: if there are no sites, or the data is empty or cannot be encoded.
    """
    if not sites:
        raise ValueError("hidden states are read at one site at least, but `sites` is empty")
    examples = analyzer.read(dataset)
    everything = examples[:]
    states: list[list[Tensor]] = [[torch.empty(0)] * len(everything) for _ in sites]
    with analyzer.forward_pass() as forward, torch.no_grad():
        for batch in forward.batches(everything, batch_size):
            seen: list[list[Tensor]] = [[] for _ in sites]

            def read(hidden: Tensor, into: list[Tensor]) -> Tensor:
                into.append(hidden.detach().to("cpu", torch.float32))
                return hidden

            with contextlib.ExitStack() as stack:
                for site, into in zip(sites, seen, strict=True):
                    stack.enter_context(site.editing(functools.partial(read, into=into)))
                forward.outputs([everything[i] for i in batch])
            for of_site, rows in zip(states, seen, strict=True):
                for i, state in zip(batch, rows[-1], strict=True):
                    of_site[i] = state
    return [torch.stack(of_site) for of_site in states]


class FeatureAblation:
    """A feature switched off by degrees at its site: h ← h − scale · contribution(h), where scale 1 removes it.

    Args:
        site: where the feature lives.
        contribution: hidden states (B, h), float32 → the feature's part of them (B, h).
    """

    def __init__(self, site: Site, contribution: Edit):
        self.site = site
        self.contribution = contribution

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module, scale: float = 1.0) -> Iterator[nn.Module]:
        """The model with the feature ablated inside `with`.

        Raises:
            ValueError: if the model differs from the site's.
        """
        if model is not self.site.model:
            raise ValueError("the feature belongs to another model object than this one")
        with self.site.editing(lambda h: h - (scale * self.contribution(h.float())).to(h.dtype)):
            yield model


def activation_kmeans(
    states: Tensor,
    n_clusters: int,
    *,
    site: Site | None = None,
    seed: int = 0,
    n_restarts: int = 10,
    seconds: float = 0,
) -> MethodResult:
    """k-means on centred hidden states; the coefficient is the cosine with a centroid.

    A cluster's intervention takes out of the centred state its projection on the centroid's direction.

    Args:
        states: (n, h).
        n_clusters: r.
        site: where the states are from, for interventions.
        seed: the seed of the starts.
        n_restarts: independent starts, of which the best is kept.
        seconds: that reading the states took.

    Raises:
        ValueError: if there are fewer examples than clusters.
        ModuleNotFoundError: if scikit-learn is not installed.

    Example:
        >>> site = Site(model)
        >>> activation_kmeans(hidden_states(analyzer, dataset, site), n_clusters=3, site=site).coefficients.shape
        torch.Size([24, 3])
    """
    check_enough(len(states), n_clusters, "n_clusters")
    cluster = load("sklearn.cluster", "k-means")
    started = time.process_time()
    mean = states.mean(0)
    X = states - mean
    clusters = cluster.KMeans(n_clusters, n_init=n_restarts, random_state=seed).fit(X.numpy())
    C = nn.functional.normalize(torch.from_numpy(clusters.cluster_centers_).float(), dim=1)
    soft = nn.functional.normalize(X, dim=1) @ C.T

    def part(h: Tensor, c: Tensor) -> Tensor:
        c = c.to(h.device)
        return ((h - mean.to(h.device)) @ c)[:, None] * c

    return MethodResult(
        "activations, k-means",
        soft,
        seconds + time.process_time() - started,
        _ablations(site, [functools.partial(part, c=c) for c in C]),
        {"inertia": float(clusters.inertia_)},
    )


def activation_nmf(
    states: Tensor, n_components: int, *, site: Site | None = None, seed: int = 0, seconds: float = 0
) -> MethodResult:
    """NMF of [max(h, 0), max(−h, 0)], hidden states split by sign since they have both.

    A component's intervention takes out the part of the state along H₊ − H₋ that the component's coefficient explains.

    Args:
        states: (n, h).
        n_components: r.
        site: where the states are from, for interventions.
        seed: the seed of the start.
        seconds: that reading the states took.

    Raises:
        ValueError: if there are fewer examples than components.
        ModuleNotFoundError: if scikit-learn is not installed.

    Example:
        >>> site = Site(model)
        >>> activation_nmf(hidden_states(analyzer, dataset, site), n_components=3, site=site).coefficients.shape
        torch.Size([24, 3])
    """
    check_enough(len(states), n_components, "n_components")
    decomposition = load("sklearn.decomposition", "NMF")
    started = time.process_time()
    split = torch.cat([states.clamp_min(0), (-states).clamp_min(0)], 1)
    # Chosen: beyond the 200 iterations of the default, so that the tolerance ends it
    model = decomposition.NMF(n_components, init="nndsvda", random_state=seed, max_iter=500, tol=1e-3)
    W = torch.from_numpy(model.fit_transform(split.numpy())).float()
    H = torch.from_numpy(model.components_).float()
    h = states.shape[1]
    D = nn.functional.normalize(H[:, :h] - H[:, h:], dim=1)

    def part(x: Tensor, d: Tensor) -> Tensor:
        d = d.to(x.device)
        return (x @ d).clamp_min(0)[:, None] * d

    return MethodResult(
        "activations, NMF",
        W,
        seconds + time.process_time() - started,
        _ablations(site, [functools.partial(part, d=d) for d in D]),
        {"error": float(model.reconstruction_err_)},
    )


def random_coefficients(n: int, r: int, *, seed: int = 0) -> MethodResult:
    """The floor: uniform random coefficients.

    Raises:
        ValueError: if n or r is not positive.
    """
    if min(n, r) < 1:
        raise ValueError(f"n and r must be at least 1, but they are {n} and {r}")
    W = torch.rand(n, r, generator=torch.Generator().manual_seed(seed))
    return MethodResult("random", W, 0.0)


def _ablations(site: Site | None, parts: Sequence[Edit]) -> Any:
    if site is None:
        return None
    return lambda features: [FeatureAblation(site, parts[j]) for j in features]
