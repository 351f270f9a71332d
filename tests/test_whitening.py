"""Rows whitened by curvature. Oracles: dense Kronecker products and dense Fishers."""

import pytest
import torch

from hf_npeff import FisherConfig, NPEFFAnalyzer, PEFs
from hf_npeff.studies.whitening import fully_whitened, kfac_whitened
from tests import reference
from tests.tiny import tiny_batch, tiny_model


def tiny_pefs() -> PEFs:
    model = tiny_model("bert", dtype=torch.float32)
    fisher = FisherConfig(rank=2, target_modules=r".*0\.attention\.self\.value", sketch="identity")
    return NPEFFAnalyzer(model, fisher=fisher).compute_pefs(tiny_batch(model, 8, seed=0))


def inner_products(rows: torch.Tensor) -> torch.Tensor:
    return (rows.flatten(0, 1) @ rows.flatten(0, 1).T).double()


def test_kfac_is_the_inverse_root_of_a_dense_kronecker_product() -> None:
    """Oracle: eigh of the dense (L + λ) ⊗ (R + λ) / tr L of one module, which `reference` makes from loops."""
    pefs = tiny_pefs()
    (name, block), *others = (pefs.sketch().blocks or {}).items()
    assert not others
    p, q = pefs.sketch().shapes[name]
    rows = pefs.factors.double() * pefs.norms.sqrt()[:, None, None]
    dense = reference.kfac(rows[..., block].reshape(8, -1, p, q), 0.3)
    values, vectors = torch.linalg.eigh(dense)
    expected = PEFs.from_factors((rows @ vectors @ torch.diag(values**-0.5) @ vectors.T).float())
    made = kfac_whitened(pefs, 0.3)
    assert torch.allclose(inner_products(made.factors), inner_products(expected.factors), atol=1e-4)


def test_full_whitening_is_that_of_the_dense_fisher() -> None:
    """Oracle: the dense (F + λI)^{-1/2}, λ from its eigenvalues that are not rounding."""
    pefs = tiny_pefs()
    rows = pefs.factors.double() * pefs.norms.sqrt()[:, None, None]
    F = torch.einsum("nca,ncb->ab", rows, rows) / len(pefs)
    values, vectors = torch.linalg.eigh(F)
    mean = values[values > values.max() * 1e-6].mean()
    dense = rows @ vectors @ torch.diag((values.clamp_min(0) + 0.1 * mean) ** -0.5) @ vectors.T
    expected = PEFs.from_factors(dense.float())
    made = fully_whitened(pefs, 0.1)
    assert torch.allclose(inner_products(made.factors), inner_products(expected.factors), atol=1e-3)


def test_what_cannot_be_whitened_is_refused() -> None:
    """Oracle: what the errors name."""
    rows = PEFs.from_factors(torch.rand(4, 2, 6))
    with pytest.raises(ValueError, match="kronecker"):
        kfac_whitened(rows, 0.1)
    for whitened in (kfac_whitened, fully_whitened):
        with pytest.raises(ValueError, match="ridge"):
            whitened(rows, 0)
