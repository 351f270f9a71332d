"""What components are compared with: other ways to find features of a model, each a row of the same tables."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time a name is imported when it is first asked for, as those of hf_npeff are
    from hf_npeff.baselines.activations import Site, activation_kmeans, activation_nmf, hidden_states
    from hf_npeff.baselines.gradient_clustering import GradientClustering, prediction_gradients
    from hf_npeff.baselines.method import MethodResult
    from hf_npeff.baselines.sparse_autoencoder import SAEConfig, SparseAutoencoder, load_published

_MODULE_OF = {
    "GradientClustering": "gradient_clustering",
    "MethodResult": "method",
    "SAEConfig": "sparse_autoencoder",
    "Site": "activations",
    "SparseAutoencoder": "sparse_autoencoder",
    "activation_kmeans": "activations",
    "activation_nmf": "activations",
    "hidden_states": "activations",
    "load_published": "sparse_autoencoder",
    "prediction_gradients": "gradient_clustering",
}
__all__ = [
    "GradientClustering",
    "MethodResult",
    "SAEConfig",
    "Site",
    "SparseAutoencoder",
    "activation_kmeans",
    "activation_nmf",
    "hidden_states",
    "load_published",
    "prediction_gradients",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'hf_npeff.baselines' has no attribute {name!r}")
        return getattr(import_module(f"hf_npeff.baselines.{_MODULE_OF[name]}"), name)
