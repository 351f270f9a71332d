"""Sparse autoencoders on hidden states: f = σ(E(x − b) + e), x̂ = Dᵀf + b, with TopK or an L1 penalty.

States are scaled by one number so that their mean squared norm about b is h; decoder rows have unit norm. Features that
no training example used since the last look are restarted on what is worst reconstructed (dead-feature revival).
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_npeff.baselines.activations import FeatureAblation, Position, Site, hidden_states
from hf_npeff.baselines.method import MethodResult
from hf_npeff.progress import training


@dataclass(frozen=True)
class SAEConfig:
    """How a sparse autoencoder is trained.

    Attributes:
        n_features: the number of features of the dictionary.
        kind: "topk" keeps the `k` largest features of an example, "l1" penalises their sum.
        k: features of an example that TopK keeps.
        l1: weight of the L1 penalty, relative to the squared error.
        tied: whether the encoder is the decoder's transpose.
        steps: the number of steps of Adam.
        batch_size: examples of a step.
        learning_rate: the learning rate of Adam, falling to zero over the last fifth.
        revive_every: steps between two looks for dead features; 0 never revives.
        held_out: share of the examples that is not trained on, and on which the error is measured.
        seed: the seed of the split, the start and the batches.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> SAEConfig(n_features=128, kind="topk", k=8).steps
        1500
    """

    n_features: int = 64
    kind: Literal["topk", "l1"] = "topk"
    k: int = 4
    l1: float = 0.05
    tied: bool = False
    steps: int = 1500
    batch_size: int = 256
    learning_rate: float = 2e-3
    revive_every: int = 200
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("topk", "l1"):
            raise ValueError(f"kind must be 'topk' or 'l1', but it is {self.kind!r}")
        if self.kind == "topk" and not 1 <= self.k <= self.n_features:
            raise ValueError(f"k must be between 1 and n_features={self.n_features}, but it is {self.k}")
        if min(self.n_features, self.steps, self.batch_size) < 1 or self.revive_every < 0:
            raise ValueError("n_features, steps and batch_size must be at least 1, revive_every at least 0")
        if not 0 < self.held_out < 1 or self.learning_rate <= 0 or self.l1 < 0:
            raise ValueError("held_out must be between 0 and 1, learning_rate positive, l1 at least 0")


class SparseAutoencoder:
    """A sparse autoencoder; `fit` trains one, `load_published` takes one from sae-lens.

    Attributes:
        encoder: E (m, h); the decoder itself where they are tied.
        encoder_bias: e (m,).
        decoder: D (m, h), unit rows.
        bias: b (h,).
        scale: what centred states are multiplied with before encoding.
        config: how it was trained.
        fvu: fraction of variance unexplained on held-out examples, Σ‖x − x̂‖² / Σ‖x − mean‖².
        dead: features that no example of the data uses.
        revived: how many features were restarted while training.

    Example:
        >>> states = hidden_states(analyzer, dataset, Site(model))
        >>> sae = SparseAutoencoder.fit(states, SAEConfig(n_features=8, k=2, steps=20))
        >>> sae.decode(sae.encode(states)).shape == states.shape
        True
    """

    def __init__(self, config: SAEConfig):
        self.config = config
        self.encoder = self.encoder_bias = self.decoder = self.bias = torch.empty(0)
        self.scale = 1.0
        self.fvu = float("nan")
        self.dead: list[int] = []
        self.revived = 0

    @classmethod
    def fit(cls, states: Tensor, config: SAEConfig | None = None) -> SparseAutoencoder:
        """Train on hidden states (n, h).

        Raises:
            ValueError: if there are fewer than 10 examples, or states that are not finite or all equal.
        """
        config = config or SAEConfig()
        if states.dim() != 2 or len(states) < 10:  # a tenth is held out: one at least
            raise ValueError(f"an autoencoder needs at least 10 hidden states (n, h), but got {tuple(states.shape)}")
        if not bool(torch.isfinite(states).all()):
            raise ValueError("the hidden states are not finite")
        sae = cls(config)
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(states), generator=generator)
        held = max(1, round(config.held_out * len(states)))
        train, test = states[order[held:]].float(), states[order[:held]].float()
        sae.bias = train.mean(0)
        spread = float((train - sae.bias).square().sum(1).mean())
        if spread == 0:
            raise ValueError("all hidden states are equal: there is nothing to encode")
        sae.scale = (states.shape[1] / spread) ** 0.5
        sae._train((train - sae.bias) * sae.scale, generator)
        sae.fvu = sae.unexplained(test)
        sae.dead = (sae.encode(states) > 0).any(0).logical_not().nonzero()[:, 0].tolist()
        return sae

    def _train(self, X: Tensor, generator: torch.Generator) -> None:
        config = self.config
        m, h = config.n_features, X.shape[1]
        D = nn.functional.normalize(torch.randn(m, h, generator=generator), dim=1)
        D.requires_grad_()
        E = D if config.tied else D.detach().clone().requires_grad_()
        e = torch.zeros(m, requires_grad=True)
        b = torch.zeros(h, requires_grad=True)
        parameters = [D, e, b] if config.tied else [D, E, e, b]
        # Chosen: a shorter memory than the default of 0.999, for runs of few steps
        optimiser = torch.optim.Adam(parameters, lr=config.learning_rate, betas=(0.9, 0.99))
        used = torch.zeros(m, dtype=torch.bool)
        last = max(1, config.steps // 5)  # the rate falls to 0 over the last fifth
        for step in training("an autoencoder", config.steps):
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * min(1.0, (config.steps - step) / last)
            x = X[torch.randint(len(X), (min(config.batch_size, len(X)),), generator=generator)]
            f = self._activate((x - b) @ E.T + e)
            loss = (f @ D + b - x).square().sum(1).mean() / h
            if config.kind == "l1":
                loss = loss + config.l1 * f.sum(1).mean() / h**0.5
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                D /= D.norm(dim=1, keepdim=True).clamp_min(1e-8)  # no feature is divided by 0
                used |= (f > 0).any(0)
                ripe = config.revive_every and (step + 1) % config.revive_every == 0
                if ripe and step < 0.8 * config.steps:  # a feature needs the last fifth to settle
                    self._revive(X, D, E, e, b, ~used, optimiser, generator)
                    used[:] = False
        self.decoder, self.encoder, self.encoder_bias = D.detach(), E.detach(), e.detach()
        self.bias = self.bias + b.detach() / self.scale

    def _revive(
        self,
        X: Tensor,
        D: Tensor,
        E: Tensor,
        e: Tensor,
        b: Tensor,
        dead: Tensor,
        optimiser: torch.optim.Adam,
        generator: torch.Generator,
    ) -> None:
        """Restart dead features on residuals, examples drawn by their squared error."""
        number = int(dead.sum())
        if not number:
            return
        x = X[torch.randperm(len(X), generator=generator)[:4096]]  # bounds the memory
        residual = x - (self._activate((x - b) @ E.T + e) @ D + b)
        error = residual.square().sum(1)
        # None may have no chance at all
        chosen = torch.multinomial(error + 1e-12, number, replacement=number > len(x), generator=generator)
        D[dead] = nn.functional.normalize(residual[chosen], dim=1)
        if E is not D:
            E[dead] = D[dead]
        e[dead] = 0
        for parameter in (D, E, e):
            for name in ("exp_avg", "exp_avg_sq"):
                if parameter in optimiser.state:
                    optimiser.state[parameter][name][dead] = 0
        self.revived += number

    def _activate(self, z: Tensor) -> Tensor:
        z = z.relu()
        if self.config.kind == "l1":
            return z
        values, places = z.topk(self.config.k, dim=1)
        return torch.zeros_like(z).scatter(1, places, values)

    def encode(self, states: Tensor) -> Tensor:
        """Features (n, m) ≥ 0 of hidden states (n, h)."""
        x = (states.float() - self.bias.to(states.device)) * self.scale
        return self._activate(x @ self.encoder.to(x.device).T + self.encoder_bias.to(x.device))

    def decode(self, features: Tensor) -> Tensor:
        """Hidden states (n, h) from features (n, m)."""
        return features @ self.decoder.to(features.device) / self.scale + self.bias.to(features.device)

    def unexplained(self, states: Tensor) -> float:
        """Fraction of variance unexplained of hidden states (n, h), at least 2 of them."""
        total = (states - states.mean(0)).square().sum()
        return float((states - self.decode(self.encode(states))).square().sum() / total)

    def contribution(self, states: Tensor, feature: int) -> Tensor:
        """A feature's part f_j d_j of hidden states (n, h)."""
        return self.encode(states)[:, feature, None] * self.decoder[feature].to(states.device) / self.scale

    def result(
        self, states: Tensor, *, site: Site | None = None, name: str = "SAE", seconds: float = float("nan")
    ) -> MethodResult:
        """Features as coefficients; with a site, features can be ablated there."""
        diagnostics = {**asdict(self.config), "fvu": self.fvu, "dead": len(self.dead), "revived": self.revived}
        return MethodResult(name, self.encode(states), seconds, _ablations(self, site, len(self.decoder)), diagnostics)


class PublishedAutoencoder:
    """An autoencoder of sae-lens, behind the same methods.

    Attributes:
        sae: the `sae_lens.SAE`.
        layer: the layer of transformers whose output it reads.
        centred: whether it was trained on states whose mean over h was taken out, as TransformerLens does where it
            centres the weights that write to the residual stream.
    """

    def __init__(self, sae: Any, layer: int, *, centred: bool = False):
        self.sae = sae
        self.layer = layer
        self.centred = centred

    def _read(self, states: Tensor) -> Tensor:
        """Hidden states (n, h) as the autoencoder wants them."""
        x = states.to(self.sae.W_dec.device, self.sae.W_dec.dtype)
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def encode(self, states: Tensor) -> Tensor:
        """Features (n, m) of hidden states (n, h)."""
        with torch.no_grad():
            return self.sae.encode(self._read(states)).float().to(states.device)

    def contribution(self, states: Tensor, feature: int) -> Tensor:
        """A feature's part of hidden states (n, h): what decoding loses without it, biases and scaling included."""
        x = self._read(states)
        with torch.no_grad():
            whole = self.sae.decode(self.sae.encode(x))
            without = self.sae.encode(x).clone()  # again: decoding may use up the norms that encoding left
            without[:, feature] = 0
            return (whole - self.sae.decode(without)).to(states.device, torch.float32)

    def result(self, states: Tensor, *, site: Site | None = None, name: str = "published SAE") -> MethodResult:
        """Features as coefficients; with a site, features can be ablated there."""
        return MethodResult(name, self.encode(states).cpu(), interventions=_ablations(self, site, len(self.sae.W_dec)))


def load_published(release: str, sae_id: str, *, device: str = "cpu") -> PublishedAutoencoder:
    """A published autoencoder, through sae-lens.

    It was trained on the residual stream as TransformerLens has it. That is transformers' own, but for models whose
    writing weights were centred: then the mean over h is taken out of the states first. What TransformerLens folds
    into other weights (norms, biases of values, the unembedding) leaves the stream as it is.

    Args:
        release: as sae-lens names it, for instance "gpt2-small-res-jb", a repository on the Hub, or a folder.
        sae_id: within the release, for instance "blocks.8.hook_resid_pre"; of a folder, the one within it that
            `save_model` wrote.
        device: where it runs.

    Raises:
        ModuleNotFoundError: if sae-lens is not installed.
        FileNotFoundError: if the release is a folder without that autoencoder.
        ValueError: if it reads something else than the residual stream, or the stream before the first layer; if it
            wants states scaled by a number that is not in its files.

    Example:
        >>> sae = load_published("gpt2-small-res-jb", "blocks.8.hook_resid_pre")  # doctest: +SKIP
    """
    folder = Path(release) / sae_id if Path(release).is_dir() else None
    if folder is not None and not (folder / "cfg.json").is_file():
        raise FileNotFoundError(f"{folder} holds no cfg.json, so no autoencoder that sae-lens saved")
    try:
        from sae_lens import SAE
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "published autoencoders are loaded by sae-lens, which is not installed; run pip install sae-lens",
            name="sae_lens",
        ) from error
    if folder is None:
        loaded = SAE.from_pretrained(release=release, sae_id=sae_id, device=device)
    else:
        loaded = SAE.load_from_disk(str(folder), device=device)
    sae = loaded[0] if isinstance(loaded, tuple) else loaded  # before version 6: with its config and sparsity
    settings = getattr(sae.cfg, "metadata", sae.cfg)
    layer = _layer_of(str(settings.hook_name))
    _check_scaling(sae.cfg)
    processing = getattr(settings, "model_from_pretrained_kwargs", None) or {}
    return PublishedAutoencoder(sae, layer, centred=bool(processing.get("center_writing_weights")))


_SCALED_INSIDE = (None, "none", "layer_norm", "constant_norm_rescale")
"""Values of `normalize_activations` that `encode` and `decode` of sae-lens see to."""


def _check_scaling(config: Any) -> None:
    """Refuse an autoencoder that wants its states scaled before it sees them."""
    scaling = getattr(config, "normalize_activations", None)
    if scaling not in _SCALED_INSIDE:
        raise ValueError(
            f"this autoencoder has normalize_activations={scaling!r}: it wants states scaled by a number that was "
            "estimated in training and is not in its files. Fold the number into its weights with sae-lens "
            "(fold_activation_norm_scaling_factor), save it with normalize_activations='none', and load that"
        )


def _layer_of(hook: str) -> int:
    """The layer of transformers whose output a hook of TransformerLens reads."""
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook)
    if match is None or hook == "blocks.0.hook_resid_pre":
        raise ValueError(
            f"this autoencoder reads {hook!r}; only the residual stream after a layer can be read here: "
            "blocks.N.hook_resid_post, or blocks.N.hook_resid_pre with N of at least 1"
        )
    return int(match[1]) - (match[2] == "pre")


def _ablations(sae: Any, site: Site | None, m: int) -> Any:
    if site is None:
        return None

    def chosen(features: Sequence[int]) -> list[FeatureAblation]:
        if bad := [j for j in features if not 0 <= j < m]:
            raise IndexError(f"there are {m} features, numbered from 0; {bad} do not exist")
        return [FeatureAblation(site, functools.partial(sae.contribution, feature=j)) for j in features]

    return chosen


def sparse_autoencoder(
    analyzer: Any,
    dataset: Any,
    config: SAEConfig,
    *,
    layer: int | str = -1,
    position: Position = "last",
    batch_size: int = 16,
    name: str = "SAE",
) -> MethodResult:
    """Hidden states, an autoencoder on them, and its row of the table."""
    started = time.process_time()
    site = Site(analyzer.model, layer, position)
    states = hidden_states(analyzer, dataset, site, batch_size=batch_size)
    sae = SparseAutoencoder.fit(states, config)
    return sae.result(states, site=site, name=name, seconds=time.process_time() - started)
