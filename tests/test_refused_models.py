"""Models that no rows can be right of: refused by name, and what the error advises works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from hf_npeff import FisherConfig, NPEFFAnalyzer, UnsupportedModelError
from tests import reference
from tests.analyses import analyzer_of, brute_force, errors
from tests.sweep.judge import ROWS, TOKENS, errors_of
from tests.sweep.tiny_models import TinyModel, build
from tests.tiny import tiny_batch, tiny_model


def analysed(tiny: TinyModel, batch_size: int = 3, **settings: Any) -> Any:
    fisher = FisherConfig(rank=ROWS, output_factor="exact", sketch="identity", **settings)
    analyzer = NPEFFAnalyzer(tiny.model, TOKENS, fisher=fisher)
    return analyzer.compute_pefs(tiny.examples, batch_size=batch_size, progress=False)


class Noise(nn.Module):
    """Adds random numbers in eval mode too, as the hashing of Reformer's attention does."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


@pytest.mark.parametrize(("lengths", "batch_size"), [((4, 7), 2), ((5, 5), 2), ((5, 5), 1)])
def test_a_model_that_draws_random_numbers_where_it_predicts_is_refused(
    lengths: tuple[int, ...], batch_size: int
) -> None:
    """Oracle: two passes over the same example give different logits; padding is not to blame."""
    model: Any = tiny_model("bert", "sequence-classification", dtype=torch.float32)
    model.dropout = Noise()
    ids = [{"input_ids": torch.randint(5, 9, (1, n))[0].tolist()} for n in lengths]
    with pytest.raises(UnsupportedModelError, match=r"%.*hash_seed"):
        NPEFFAnalyzer(model).compute_pefs(ids, batch_size=batch_size, progress=False)


def test_a_model_of_which_autograd_contradicts_itself_is_refused() -> None:
    """Oracle: finite differences, which autograd's gradient of a single example misses and that of two hits.

    CvT's batch normalisation gets a single example and its gradient in different orders of memory.
    """
    tiny = build("cvt", "image-classification")
    model: Any = tiny.model.double()
    images = [example["pixel_values"].double() for example in tiny.examples]
    weight = model.cvt.encoder.stages[0].layers[0].attention.attention.projection_query.weight

    def logit(n: int) -> Tensor:
        return model(pixel_values=torch.stack(images[:1] * n)).logits[0, 0]

    ((alone,), (twice,)) = (torch.autograd.grad(logit(n), weight) for n in (1, 2))
    with torch.no_grad():
        weight[0, 0] += 1e-5
        up = logit(1)
        weight[0, 0] -= 2e-5
        down = logit(1)
        weight[0, 0] += 1e-5
    assert float((up - down) / 2e-5) == pytest.approx(float(twice[0, 0]), rel=1e-4)
    if torch.allclose(alone, twice, rtol=1e-3):
        pytest.skip("this version of PyTorch has mended its batch normalisation")
    with pytest.raises(UnsupportedModelError, match=r"PyTorch's own gradient of cvt\..* twice"):
        NPEFFAnalyzer(model).compute_pefs([{"pixel_values": image} for image in images], progress=False)


def test_a_weight_that_is_read_without_its_module_is_refused_and_the_advice_works() -> None:
    """Oracle: JᵀSJ by autograd, where the weight is named in `parameters`; NeoMME multiplies by it a second time."""
    tiny = build("neomme", "masked-lm")
    with pytest.raises(UnsupportedModelError) as refused:
        analysed(tiny)
    name = "model.embed_tokens.embedding_projection.weight"
    assert "exclude_modules=['model.embed_tokens.embedding_projection', 'unembedding_projection']" in str(refused.value)
    assert f"parameters=['{name}']" in str(refused.value)
    assert max(errors_of(tiny, analysed(tiny, parameters=[name])).values()) < 1e-4


def test_reversible_layers_are_refused_and_the_advice_works() -> None:
    """Oracle: JᵀSJ by autograd, of the classifier's weights, which are outside the reversible layers."""
    tiny = build("reformer", "sequence-classification")
    for module in tiny.model.modules():
        if hasattr(module, "hash_seed"):
            module.hash_seed = 0
    with pytest.raises(UnsupportedModelError, match=r"_ReversibleFunction.*exclude_modules='reformer\.\*'"):
        analysed(tiny)
    assert max(errors_of(tiny, analysed(tiny, exclude_modules=r"reformer\..*")).values()) < 1e-4


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_a_layer_that_is_left_out_at_random_where_the_model_predicts_is_refused(share: float) -> None:
    """Oracle: the error, for every seed; in training alone (stochastic depth, LayerDrop) nothing is left out."""
    model = tiny_model("llama", dtype=torch.float32)

    def drop(module: Any, args: Any, output: Any) -> Any:
        return args[0] if module.training != always and torch.rand(()) < share else output

    for layer in model.model.layers:
        layer.register_forward_hook(drop)
    examples = tiny_batch(model, 3, seed=1)
    always = False
    model.train()  # in which layers are left out; an analysis puts the model into eval mode
    norms = [NPEFFAnalyzer(model, fisher=FisherConfig(rank=2)).compute_pefs(examples).norms for _ in range(2)]
    assert torch.equal(*norms) and model.training
    always = True
    for seed in range(5):
        torch.manual_seed(seed)
        with pytest.raises(UnsupportedModelError, match="random numbers"):
            NPEFFAnalyzer(model, fisher=FisherConfig(rank=2)).compute_pefs(examples)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_layer_that_comes_twice_is_refused_with_its_cache_and_the_advice_works(family: str) -> None:
    """Oracle: brute force on the model without a cache; with one, its second layer reads the keys of both."""
    model: Any = tiny_model(family, dtype=torch.float64)
    layers = model.model.layers if family == "llama" else model.transformer.h
    layers[1] = layers[0]
    data = tiny_batch(model, 3, seed=3)
    analyzer = analyzer_of(model, rank=12, output_factor="exact")
    with pytest.raises(UnsupportedModelError, match="use_cache"):
        analyzer.compute_pefs(data, progress=False)
    model.config.use_cache = False
    pefs = analyzer.compute_pefs(data, progress=False)
    assert max(errors(analyzer, pefs, brute_force(analyzer, data))) < 1e-6


def test_a_model_that_fails_with_its_cache_alone_is_analysed_without_one() -> None:
    """Oracle: the same weights in a model whose cache works."""
    model: Any = tiny_model("llama", dtype=torch.float64)
    data = tiny_batch(model, 3, seed=3)
    expected = analyzer_of(model, rank=4).compute_pefs(data, progress=False)

    def fails(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs.get("use_cache") is not False:
            raise RuntimeError("no cache here")

    handle = model.register_forward_pre_hook(fails, with_kwargs=True)
    pefs = analyzer_of(model, rank=4).compute_pefs(data, progress=False)
    handle.remove()
    torch.testing.assert_close(pefs.factors, expected.factors)


def test_a_model_that_fails_with_its_cache_and_differs_without_is_refused() -> None:
    """Oracle: a number that grows with every pass is added to the logits; no random generator moves."""
    model: Any = tiny_model("llama", dtype=torch.float64)
    passes: list[int] = []

    def fails(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs.get("use_cache") is not False:
            raise RuntimeError("no cache here")
        passes.append(1)

    model.register_forward_pre_hook(fails, with_kwargs=True)
    model.lm_head.register_forward_hook(lambda module, args, out: out * len(passes))
    with pytest.raises(UnsupportedModelError, match="between passes"):
        analyzer_of(model, rank=4).compute_pefs(tiny_batch(model, 3, seed=3), progress=False)


def test_positions_that_run_on_do_not_hide_a_layer_that_comes_twice() -> None:
    """Oracle: the same model without position_ids is refused; positions 0, 1, … are those that it counts itself."""
    model: Any = tiny_model("llama", dtype=torch.float64)
    model.model.layers[1] = model.model.layers[0]
    data = [{**row, "position_ids": list(range(len(row["input_ids"])))} for row in tiny_batch(model, 3, seed=3)]
    with pytest.raises(UnsupportedModelError, match="use_cache"):
        analyzer_of(model, rank=4).compute_pefs(data, progress=False)


class ClassesForQuestionAnswering(BertForSequenceClassification):
    """Answers questions by one of a few classes, as ViLT and VisualBERT do."""


def test_a_model_that_answers_questions_by_classes_is_refused_and_the_advice_works() -> None:
    """Oracle: JᵀSJ by autograd with the advised task; the error names what the model gives instead of a span."""
    plain: Any = tiny_model("bert", "sequence-classification")
    model = ClassesForQuestionAnswering(plain.config).to(torch.float64).eval()
    model.load_state_dict(plain.state_dict())
    examples = tiny_batch(plain, 3, seed=1)
    with pytest.raises(UnsupportedModelError, match=r"logits.*task='sequence-classification'"):
        NPEFFAnalyzer(model).compute_pefs(examples, progress=False)
    fisher = FisherConfig(rank=ROWS, output_factor="exact", sketch="identity", storage_dtype="float64")
    analyzer = NPEFFAnalyzer(model, fisher=fisher, task="sequence-classification")
    pefs = analyzer.compute_pefs(examples, progress=False)
    truth = brute_force(analyzer_of(plain), examples)
    for B, A, norm in zip(truth, pefs.factors, pefs.norms, strict=True):
        assert reference.relative_error_of_factors(B, A.double() * norm.sqrt()) < 1e-6
