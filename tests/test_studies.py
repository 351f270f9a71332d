"""Measures against annotated attributes, and the word-relation prompts. Oracles: counting pairs, and the word list."""

import importlib.util

import pytest
import torch

from hf_npeff.data import Examples
from hf_npeff.studies.factors import auroc, best_components, purity
from hf_npeff.studies.word_relations import WORD_RELATIONS, package_folder, word_pairs, word_relation_prompts
from tests import reference
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize("seed", range(5))
def test_auroc_counts_pairs_with_ties_as_a_half(seed: int) -> None:
    """Oracle: brute force over all pairs."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (40,), generator=generator).float()
    positives = torch.rand(40, generator=generator) < 0.3
    positives[:2] = torch.tensor([True, False])
    assert auroc(scores, positives) == pytest.approx(reference.auroc(scores, positives), abs=1e-12)


def test_auroc_of_one_class_is_refused() -> None:
    """Oracle: the definition has no value there."""
    with pytest.raises(ValueError, match="AUROC"):
        auroc(torch.rand(4), torch.ones(4, dtype=torch.bool))


def test_the_best_component_of_a_value_is_the_one_that_ranks_it_highest() -> None:
    """Oracle: a planted W whose columns are the attribute's own indicator."""
    values = ["a", "b", "c", "a", "b", "c"]
    W = torch.tensor([[float(v == "b"), float(v == "a"), float(v == "c")] for v in values])
    assert best_components(W, values) == {"a": (1, 1.0), "b": (0, 1.0), "c": (2, 1.0)}


def test_purity_is_the_share_of_the_commonest_value() -> None:
    """Oracle: counted by hand."""
    assert purity(["x", "y", "x", "x"]) == ("x", 0.75)
    with pytest.raises(ValueError, match="purity"):
        purity([])


def test_a_missing_package_says_what_to_install() -> None:
    """Oracle: the message."""
    with pytest.raises(ModuleNotFoundError, match="no_such_package_here"):
        package_folder("no_such_package_here", "pip install it")


class TestPrompts:
    pytest.importorskip("gensim", reason="the word list comes with gensim")

    def test_every_prompt_solves_four_other_pairs_of_its_relation_and_leaves_the_answer_out(self) -> None:
        """Oracle: the word list itself."""
        pairs = word_pairs()
        prompts = word_relation_prompts(queries=18)
        assert len(prompts) == 18 * len(WORD_RELATIONS)
        for prompt in prompts:
            *shots, query = prompt["text"].split("\n")
            known = {f"{a} -> {b}" for a, b in pairs[prompt["relation"]]}
            assert len(shots) == len(set(shots)) == 4 and set(shots) <= known
            assert query == f"{prompt['word']} ->"
            assert (prompt["word"], prompt["answer"]) in pairs[prompt["relation"]]
            assert f"{prompt['word']} -> {prompt['answer']}" not in shots

    def test_the_same_seed_gives_the_same_prompts_and_another_gives_others(self) -> None:
        """Oracle: equality."""
        assert word_relation_prompts(4, seed=1) == word_relation_prompts(4, seed=1)
        assert word_relation_prompts(4, seed=1) != word_relation_prompts(4, seed=2)

    def test_numbers_out_of_range_are_refused(self) -> None:
        """Oracle: the messages."""
        with pytest.raises(ValueError, match=r"queries.*0"):
            word_relation_prompts(0)
        with pytest.raises(ValueError, match=r"capital.*200"):
            word_relation_prompts(1, shots=200)


def test_word_relation_prompts_are_read_as_they_are_written() -> None:
    """Oracle: the tokenizer on `text` alone; no other column makes a pair with it."""
    prompts = [{"text": "cat -> dog", "word": "cat", "answer": "dog", "relation": "plural"}]
    if importlib.util.find_spec("gensim") is not None:
        assert set(word_relation_prompts(1)[0]) == set(prompts[0])
    tokenizer = tiny_tokenizer()
    assert Examples(prompts, tokenizer)[0].inputs["input_ids"] == tokenizer("cat -> dog")["input_ids"]
