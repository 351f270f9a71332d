"""What a head predicts and where: problem types, positions, overrides and heads of one's own, against brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hf_npeff import FisherConfig, NPEFFAnalyzer, OutputHead, Outputs, UnsupportedModelError
from hf_npeff.fisher.distributions import Gaussian
from tests import reference, tiny
from tests.test_families import SMALL, analyzer_of, as_rows, pair, worst_error


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("single_label_classification", 2),
        ("single_label_classification", 4),
        ("multi_label_classification", 3),
        ("regression", 1),
        ("regression", 3),
        (None, 1),
        (None, 3),
    ],
)
@pytest.mark.parametrize("family", ["bert", "gpt2", "bart"])
def test_all_problem_types_equal_brute_force(family: str, problem: str | None, labels: int) -> None:
    """Oracle: JᵀSJ with S = diag(p) − ppᵀ, diag(p(1 − p)) or I, as the config's problem type says."""
    task = "sequence-classification"
    model, exact = pair(family, task, problem_type=problem, num_labels=labels)
    examples = tiny.tiny_batch(model, 3, seed=5, labels=True)
    if problem == "multi_label_classification":
        examples = [{"input_ids": e["input_ids"]} for e in examples]  # a list would be labels per token
    assert worst_error(analyzer_of(model), exact, examples, reference.terms_of(task)) <= 1e-4


def test_two_classes_need_one_row() -> None:
    """Oracle: S = diag(p) − ppᵀ of two classes has rank one."""
    model = tiny.tiny_model("bert", num_labels=2)
    pefs = NPEFFAnalyzer(model, tiny.tiny_tokenizer()).compute_pefs(tiny.tiny_batch(model, 3, seed=1))
    assert pefs.rank == 1


@pytest.mark.parametrize("positions", ["last", "labels", "all"])
def test_a_causal_lm_predicts_at_the_positions_that_are_asked_for(positions: str) -> None:
    """Oracle: one softmax at the last token, where the next token is labelled, or everywhere."""
    model, exact = pair("llama", "causal-lm", vocab_size=14)
    examples = tiny.tiny_batch(model, 3, seed=6, labels=True, max_length=6)
    analyzer = analyzer_of(model, positions=positions, rank=100)
    assert worst_error(analyzer, exact, examples, reference.terms_of("causal-lm", positions)) <= 1e-4


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_token_classification_leaves_out_ignored_tokens(family: str) -> None:
    """Oracle: one softmax per token, without those labelled −100."""
    model, exact = pair(family, "token-classification")
    examples = tiny.tiny_batch(model, 3, seed=7, labels=True)
    examples[0]["labels"][2] = -100
    assert worst_error(analyzer_of(model), exact, examples, reference.terms_of("token-classification")) <= 1e-4


def test_columns_that_the_model_does_not_take_need_not_fit_into_a_batch() -> None:
    """Oracle: the same examples without them; ragged lists beside the input ids, and only in some examples."""
    model = tiny.tiny_model("bert", "token-classification", vocab_size=SMALL)
    examples = tiny.tiny_batch(model, 3, seed=7)
    extra = [dict(e, words=list(range(i + 1))) for i, e in enumerate(examples)]
    extra[1]["offsets"] = [[0, 1], [1, 2]]
    ours, theirs = (analyzer_of(model).compute_pefs(e) for e in (extra, examples))
    assert torch.equal(ours.factors, theirs.factors)


@pytest.mark.parametrize("with_labels", [False, True])
def test_a_masked_lm_predicts_at_its_mask_tokens(with_labels: bool) -> None:
    """Oracle: one softmax per mask token; without a tokenizer, per label."""
    model, exact = pair("bert", "masked-lm")
    examples = tiny.tiny_batch(model, 3, seed=8, labels=with_labels)
    analyzer = analyzer_of(model)
    if with_labels:
        analyzer = NPEFFAnalyzer(model, fisher=analyzer.fisher)
    assert worst_error(analyzer, exact, examples, reference.terms_of("masked-lm")) <= 1e-4


def test_an_answer_is_two_softmaxes_without_the_padding() -> None:
    """Oracle: start and end over the real tokens of each example alone; lengths 4 and 12 share a batch here."""
    model, exact = pair("bert", "question-answering")
    examples = [
        *tiny.tiny_batch(model, 1, seed=9, min_length=4, max_length=4),
        *tiny.tiny_batch(model, 1, seed=9, min_length=12, max_length=12),
    ]
    assert worst_error(analyzer_of(model), exact, examples, reference.terms_of("question-answering")) <= 1e-4


@pytest.mark.one_in(2)
@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("positions", ["last", "labels", "all"])
def test_a_seq2seq_model_predicts_at_its_decoder_positions(family: str, positions: str) -> None:
    """Oracle: labels shifted right are the decoder's inputs; "last" is the last real one, however others are padded."""
    model, exact = pair(family, "seq2seq-lm", vocab_size=14)
    examples = tiny.tiny_batch(model, 3, seed=10)
    assert len({len(e["labels"]) for e in examples}) > 1
    terms = reference.terms_of("seq2seq-lm", [-1] if positions == "last" else "labels")
    assert worst_error(analyzer_of(model, positions=positions), exact, examples, terms) <= 1e-4


def test_decoder_inputs_of_ones_own_may_differ_in_length() -> None:
    """Oracle: the last of the decoder inputs of each example alone."""
    model, exact = pair("t5", "seq2seq-lm", vocab_size=14)
    examples = [{"input_ids": e["input_ids"], "decoder_input_ids": [0, *e["labels"]]}
                for e in tiny.tiny_batch(model, 3, seed=11)]  # fmt: skip
    assert worst_error(analyzer_of(model), exact, examples, reference.terms_of("seq2seq-lm", [-1])) <= 1e-4


def test_a_seq2seq_model_without_labels_predicts_its_first_token() -> None:
    """Oracle: the decoder reads its start token alone."""
    model, exact = pair("t5", "seq2seq-lm", vocab_size=14)
    examples = [{"input_ids": e["input_ids"]} for e in tiny.tiny_batch(model, 3, seed=12)]
    inner = reference.terms_of("seq2seq-lm", [-1])

    def terms(m: Any, batch: Any) -> Any:
        return inner(m, {**batch, "decoder_input_ids": torch.tensor([[tiny.PAD]])})

    assert worst_error(analyzer_of(model), exact, examples, terms) <= 1e-4


def test_multiple_choices_of_different_numbers_get_batches_of_their_own() -> None:
    """Oracle: JᵀSJ over each example's own choices, without a warning that they go one at a time."""
    model, exact = pair("roberta", "multiple-choice")
    examples = [tiny.tiny_batch(model, 1, seed=i, n_choices=n)[0] for i, n in enumerate((2, 4, 3, 4, 2))]
    analyzer = analyzer_of(model)
    assert worst_error(analyzer, exact, examples, reference.terms_of("multiple-choice")) <= 1e-4
    assert not analyzer._trials.one_at_a_time


def test_a_multiple_choice_is_one_softmax_whatever_the_lengths_of_its_choices() -> None:
    """Oracle: JᵀSJ over the choices; the number of choices is the number of classes."""
    model, exact = pair("roberta", "multiple-choice")
    examples = tiny.tiny_batch(model, 3, seed=13, n_choices=4)
    assert worst_error(analyzer_of(model), exact, examples, reference.terms_of("multiple-choice")) <= 1e-4


class OwnClassifier(transformers.BertForSequenceClassification):
    """A class whose name tells no task."""


def own_classifier() -> Any:
    model = tiny.tiny_model("bert", vocab_size=SMALL)
    model.__class__ = OwnClassifier
    return model


def test_task_overrides_what_the_class_name_tells() -> None:
    """Oracle: the same weights under the name that transformers gives them."""
    model = own_classifier()
    settings = FisherConfig(sketch="identity", storage_dtype="float64")
    examples = tiny.tiny_batch(tiny.tiny_model("bert", vocab_size=SMALL), 3, seed=1)
    with pytest.raises(UnsupportedModelError, match="OwnClassifier"):
        NPEFFAnalyzer(model, tiny.tiny_tokenizer(), fisher=settings)
    ours = NPEFFAnalyzer(model, tiny.tiny_tokenizer(), fisher=settings, task="sequence-classification")
    theirs = NPEFFAnalyzer(tiny.tiny_model("bert", vocab_size=SMALL), tiny.tiny_tokenizer(), fisher=settings)
    torch.testing.assert_close(
        ours.compute_pefs(examples).factors, theirs.compute_pefs(examples).factors, rtol=0, atol=0
    )


def encoder() -> Any:
    torch.manual_seed(0)
    config = tiny.tiny_model("bert").config
    return transformers.AutoModel.from_config(config, add_pooling_layer=False).double().eval()


@pytest.mark.parametrize("task", [None, "reading-tea-leaves"])
def test_an_unknown_head_is_refused_with_the_protocol_to_implement(task: str | None) -> None:
    """Oracle: an encoder without a head predicts nothing; the message names OutputHead and what it returns."""
    with pytest.raises(UnsupportedModelError, match="OutputHead"):
        NPEFFAnalyzer(encoder(), tiny.tiny_tokenizer(), task=task)


def test_an_object_that_is_no_head_is_refused() -> None:
    """Oracle: the protocol has one method, `outputs`."""
    with pytest.raises(ValueError, match="`outputs`"):
        NPEFFAnalyzer(encoder(), tiny.tiny_tokenizer(), task=object())  # type: ignore[arg-type]


class MeanEmbedding:
    """A head of one's own: the mean of the real tokens' hidden states, with unit Gaussian noise."""

    def outputs(self, model: Any, batch: Any) -> Outputs:
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        mean = ((hidden * mask).sum(1) / mask.sum(1))[:, None]
        return Outputs(mean, mean.detach(), torch.ones(len(mean), 1, dtype=torch.bool), Gaussian)


def test_a_head_of_ones_own_on_a_bare_encoder_equals_brute_force() -> None:
    """Oracle: JᵀJ of the mean embedding, one autograd pass per number of it, on each example alone."""
    model = encoder()
    head = MeanEmbedding()
    assert isinstance(head, OutputHead)
    examples = [{"input_ids": [2, 9, 10, 11, 1]}, {"input_ids": [2, 12, 1]}, {"input_ids": [2, 13, 14, 1]}]
    fisher = FisherConfig(rank=16, sketch="identity", storage_dtype="float64")
    analyzer = NPEFFAnalyzer(model, tiny.tiny_tokenizer(), fisher=fisher, task=head)
    pefs = analyzer.compute_pefs(examples)
    names = [m.parameter for m in analyzer.maps]

    def mean_of(m: Any, batch: Any) -> Tensor:
        return m(**batch).last_hidden_state[0].mean(0)

    for i, example in enumerate(examples):
        J = reference.jacobian(model, {"input_ids": torch.tensor([example["input_ids"]])}, names, mean_of)
        A = pefs.factors[i] * pefs.norms[i].sqrt()
        assert reference.relative_error_of_factors(as_rows(analyzer, model, J), A) <= 1e-10


def test_terms_of_different_numbers_are_kept_apart_from_one_batch_to_the_next() -> None:
    """Oracle: predictions of masked LMs with one, two and three masks, padded with −1, in any batch size."""
    model = tiny.tiny_model("bert", "masked-lm", vocab_size=SMALL)
    texts = [[2, 3, 9, 1], [2, 3, 3, 10, 1], [2, 3, 3, 3, 1], [2, 3, 11, 1]]
    analyzer = analyzer_of(model)
    single, together = (analyzer.compute_pefs([{"input_ids": t} for t in texts], batch_size=b) for b in (1, 4))
    assert single.predictions is not None and together.predictions is not None
    assert ((single.predictions >= 0).sum(1) == torch.tensor([1, 2, 3, 1])).all()
    assert torch.equal(single.predictions, together.predictions)
