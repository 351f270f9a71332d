"""The rater by likelihoods, and tasks whose distractors are like the members. Oracles: slow loops, planted words."""

import pytest
import torch

from hf_npeff.baselines.method import MethodResult
from hf_npeff.studies.likelihood_rater import intruder_by_likelihood, log_likelihoods, rate_by_likelihood
from hf_npeff.studies.ratings import RatingStudy
from hf_npeff.studies.scripted_rater import intruders_found, two_groups
from hf_npeff.studies.settings import RatingsConfig
from tests.tiny import tiny_model, tiny_tokenizer

TEXTS = [f"the {kind} {'is ' * (i % 3)}red" for i in range(20) for kind in ("cat", "king", "paris")]


def slow(model: torch.nn.Module, tokenizer: object, context: str, text: str) -> float:
    """Mean log-probability of a text's tokens, token by token, each from a whole pass without a cache."""
    a, b = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (context, text))  # type: ignore[operator]
    total, ids = 0.0, [tokenizer.bos_token_id, *a]  # type: ignore[attr-defined]
    for token in b:
        with torch.no_grad():
            total += float(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token])
        ids.append(token)
    return total / len(b)


def test_likelihoods_and_choices_are_those_of_single_passes() -> None:
    """Oracle: brute force without batches, padding or a cache; the intruder by hand from the same numbers."""
    model, tokenizer = tiny_model("llama", dtype=torch.float32), tiny_tokenizer()
    texts = [" the cat", " is the king red paris", " red"]
    found = log_likelihoods(model, tokenizer, "the king is", texts)
    assert found.tolist() == pytest.approx([slow(model, tokenizer, "the king is", t) for t in texts], abs=1e-5)
    with pytest.raises(ValueError, match="no tokens"):
        log_likelihoods(model, tokenizer, "the", ["cat", ""])

    W = torch.rand(len(TEXTS), 1, generator=torch.Generator().manual_seed(0))
    distinct = [f"{text} {'cat ' * (i // 9)}{'king ' * (i % 9)}" for i, text in enumerate(TEXTS)]
    study = RatingStudy.make([MethodResult("m", W)], distinct, RatingsConfig(features=1, shown=2, members=2))

    def gain(shown: list[str], text: str) -> float:
        listed = "".join(f"- {each}\n" for each in shown) + "-"
        return slow(model, tokenizer, listed, text) - slow(model, tokenizer, "-", text)

    (task,) = study.tasks
    answers = rate_by_likelihood(study, model, tokenizer, "tiny")
    assert answers.rater == "tiny" and answers.study == study.id
    assert answers.picked[task.id] == two_groups([gain(task.shown, text) for text in task.choices])
    three = [*task.shown, task.choices[0]]
    gains = [gain(three[:i] + three[i + 1 :], text) for i, text in enumerate(three)]
    assert intruder_by_likelihood(model, tokenizer)(three) == gains.index(min(gains))


def test_distractors_can_have_the_members_values() -> None:
    """Oracle: the values of the choices; lengths that only members have leave no task. Few intruders are the first."""
    W = torch.rand(len(TEXTS), 4, generator=torch.Generator().manual_seed(0))
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS)]
    lengths = {text: len(text.split()) for text in texts}
    alike = RatingStudy.make([MethodResult("m", W)], texts, alike=list(lengths.values()))
    assert len(alike.tasks) == 4
    for task in alike.tasks:
        members = alike.key[task.id].members
        groups = [[lengths[t] for t, m in zip(task.choices, members, strict=True) if m == kind] for kind in (1, 0)]
        assert sorted(2 * groups[0]) == sorted(groups[1])  # six distractors, three members
    asked: list[str] = []
    intruders_found(alike, lambda shown: asked.extend(shown) or 0, most=1)
    first = [next(t for t, m in zip(k.choices, alike.key[k.id].members, strict=True) if not m) for k in alike.tasks]
    assert all(text in asked for text in first) and len(asked) == 4 * 7
    alone = torch.arange(len(texts), dtype=torch.float32)[:, None]
    with pytest.raises(ValueError, match="the value True of a top one"):
        RatingStudy.make([MethodResult("m", alone)], texts, alike=[i > 40 for i in range(len(texts))])
    with pytest.raises(ValueError, match=r"1 values.*60"):
        RatingStudy.make([MethodResult("m", alone)], texts, alike=[1])
