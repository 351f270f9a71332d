"""Ratings: blinded tasks, the form in a real browser, agreement, and language models as raters.

Oracles: Krippendorff's worked example, brute force over coincidences, hand-computed accuracies, scripted raters.
"""

import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_npeff.baselines.method import MethodResult
from hf_npeff.studies.detection import detection_accuracy, krippendorff_alpha, score_ratings
from hf_npeff.studies.raters import Cached, InferenceChat, LocalChat, prompt, rate, read_numbers
from hf_npeff.studies.ratings import Answers, RatingStudy
from hf_npeff.studies.scripted_rater import (
    WordVectors,
    intruder_by_words,
    intruders_found,
    rate_by_words,
    terms,
    two_groups,
)
from hf_npeff.studies.settings import RatingsConfig
from tests.tiny import tiny_model, tiny_tokenizer

KINDS = ("cat", "king", "paris", "red")
TEXTS = [f"{kind} <b>{i}</b> & | \u2028 </script> {i * i}" for i in range(25) for kind in KINDS]


def methods() -> list[MethodResult]:
    """One whose features are the kinds, and one of noise."""
    kinds = torch.tensor([[float(text.startswith(kind)) for kind in KINDS] for text in TEXTS])
    noise = torch.rand(100, 4, generator=torch.Generator().manual_seed(0))
    return [MethodResult("kinds", kinds + 0.1 * noise), MethodResult("noise", noise)]


@pytest.fixture
def study() -> RatingStudy:
    return RatingStudy.make(methods(), TEXTS, RatingsConfig(features=3))


class TestTasks:
    def test_choices_are_held_out_members_and_distractors_of_the_lower_half(self, study: RatingStudy) -> None:
        """Oracle: the coefficients."""
        W = {m.name: m.coefficients for m in methods()}
        assert len(study.tasks) == 6
        for task in study.tasks:
            key = study.key[task.id]
            w = dict(zip(TEXTS, W[key.method][:, key.feature].tolist(), strict=True))
            members = [t for t, m in zip(task.choices, key.members, strict=True) if m]
            others = [t for t, m in zip(task.choices, key.members, strict=True) if not m]
            assert (len(task.shown), len(members), len(others)) == (6, 3, 6)
            top = sorted(w, key=lambda t: -w[t])[:9]
            assert set(task.shown) | set(members) == set(top)
            assert max(w[t] for t in others) <= sorted(w.values())[50]

    def test_what_raters_get_does_not_tell_the_method(self, study: RatingStudy, tmp_path: Path) -> None:
        """Oracle: the files, searched; the order, which mixes methods and follows the seed."""
        study.export(tmp_path)
        for name in ("form.html", "tasks.jsonl"):
            content = (tmp_path / name).read_text(encoding="utf-8")
            assert not any(word in content for word in ("noise", '"kinds"', "members", "feature"))
        order = [study.key[task.id].method for task in study.tasks]
        assert order != sorted(order) and order != sorted(order, reverse=True)
        assert RatingStudy.make(methods(), TEXTS, RatingsConfig(features=3)) == study
        assert RatingStudy.make(methods(), TEXTS, RatingsConfig(features=3, seed=1)).id != study.id
        assert RatingStudy.load(tmp_path) == study

    def test_features_without_enough_examples_are_reported(self) -> None:
        """Oracle: a hard assignment of few members, whose top is tied with nothing below."""
        W = torch.zeros(100, 2)
        W[:, 0] = 1
        W[:20, 1] = torch.arange(20) + 1.0
        made = RatingStudy.make([MethodResult("m", W)], TEXTS)
        assert set(made.excluded) == {"m, feature 0"} and len(made.tasks) == 1
        assert "clearly smaller" in made.excluded["m, feature 0"]
        repeated = MethodResult("m", torch.rand(100, 1))
        with pytest.raises(ValueError, match=r"'m, feature 0'.*2"):
            RatingStudy.make([repeated], ["a", "b"] * 50)
        with pytest.raises(ValueError, match=r"100.*3"):
            RatingStudy.make([repeated], ["a", "b", "c"])

    def test_files_of_other_studies_are_refused(self, study: RatingStudy, tmp_path: Path) -> None:
        """Oracle: the messages."""
        other = RatingStudy.make(methods(), TEXTS, RatingsConfig(features=3, seed=1))
        task = study.tasks[0].id
        cases: list[tuple[Any, str]] = [
            ({"study": other.id, "rater": "a", "answers": {}}, other.id),
            ({"study": study.id, "rater": " ", "answers": {}}, "rater"),
            ({"study": study.id, "rater": "a", "answers": {"nope": {"picked": [0]}}}, "'nope'"),
            ({"study": study.id, "rater": "a", "answers": {task: {"picked": [9]}}}, rf"{task}.*9.*\[9\]"),
            ({"study": study.id, "rater": "a", "answers": {task: {"picked": [1, 1]}}}, rf"{task}.*9.*\[1, 1\]"),
            ({"study": study.id, "rater": "a", "answers": {task: {"picked": "all"}}}, r"a\.json"),
            ([1, 2], r"a\.json"),
        ]
        for content, message in cases:
            (tmp_path / "a.json").write_text(json.dumps(content))
            with pytest.raises(ValueError, match=message):
                study.read_answers(tmp_path / "a.json")
        study.export(tmp_path)
        other.export(tmp_path / "other")
        (tmp_path / "key.json").write_bytes((tmp_path / "other" / "key.json").read_bytes())
        with pytest.raises(ValueError, match=r"tasks\.jsonl.*key\.json"):
            RatingStudy.load(tmp_path)


def perfect(study: RatingStudy, rater: str) -> Answers:
    picked = {t: [i for i, m in enumerate(key.members) if m] for t, key in study.key.items()}
    return Answers(study.id, rater, dict.fromkeys(picked, "a theme"), picked)


def test_accuracy_by_hand() -> None:
    """Oracle: by hand; nothing and everything picked are chance."""
    members = [True, True, False, False, False, False]
    assert detection_accuracy(members, [0, 1]) == 1
    assert detection_accuracy(members, [0, 2]) == pytest.approx((0.5 + 0.75) / 2)
    assert detection_accuracy(members, []) == detection_accuracy(members, range(6)) == 0.5
    with pytest.raises(ValueError, match=r"member.*distractor"):
        detection_accuracy([True], [0])


def nominal_alpha(rows: list[list[float]]) -> float:
    """1 − D_o/D_e over coincidences, pair by pair: Krippendorff (2011), computed the slow way."""
    units = [[v for v in column if not math.isnan(v)] for column in zip(*rows, strict=True)]
    units = [u for u in units if len(u) >= 2]
    values = [v for u in units for v in u]
    observed = sum(sum(a != b for a, b in itertools.permutations(u, 2)) / (len(u) - 1) for u in units)
    expected = sum(a != b for a, b in itertools.permutations(values, 2)) / (len(values) - 1)
    return 1 - observed / expected


def test_alpha_is_that_of_krippendorffs_worked_example() -> None:
    """Oracle: the published value, .691 for nominal data (Krippendorff 2011, and the package's own documentation)."""
    pytest.importorskip("krippendorff", reason="it computes the agreement")
    _ = math.nan
    ratings = [
        [_, _, _, _, _, 3, 4, 1, 2, 1, 1, 3, 3, _, 3],
        [1, _, 2, 1, 3, 3, 4, 3, _, _, _, _, _, _, _],
        [_, _, 2, 1, 3, 4, 4, _, 2, 1, 1, 3, 3, _, 4],
    ]
    alpha = krippendorff_alpha(ratings)
    assert alpha == pytest.approx(0.691, abs=5e-4) and alpha == pytest.approx(nominal_alpha(ratings))
    assert krippendorff_alpha([[1, 1, _], [1, 1, 0]]) is None  # no pair differs: undefined
    assert krippendorff_alpha([[1, _], [_, 0]]) is None  # nothing was rated twice


def test_scores_per_method_with_two_raters(study: RatingStudy) -> None:
    """Oracle: by hand, and brute force for the agreement: one rater is right, the other picks nothing in one task."""
    pytest.importorskip("krippendorff", reason="it computes the agreement")
    a, b = perfect(study, "a"), perfect(study, "b")
    kinds = [t.id for t in study.tasks if study.key[t.id].method == "kinds"]
    noise = [t.id for t in study.tasks if study.key[t.id].method == "noise"]
    b.picked[kinds[0]] = []
    del b.picked[noise[0]], b.picked[noise[1]], b.picked[noise[2]]
    result = score_ratings(study, [a, b])
    rows = {row.method: row for row in result.detection}
    assert rows["kinds"].accuracy == pytest.approx((0.75 + 1 + 1) / 3) and rows["noise"].accuracy == 1
    assert rows["kinds"].interval[0] < rows["kinds"].accuracy <= rows["kinds"].interval[1] <= 1
    ratings = [[float(i in x.picked[t]) for t in kinds for i in range(9)] for x in (a, b)]
    assert rows["kinds"].alpha == pytest.approx(nominal_alpha(ratings)) and rows["noise"].alpha is None
    assert result.alpha == pytest.approx(nominal_alpha(ratings))
    assert result.unanswered["b"] == dict.fromkeys(noise, "no answer") and not result.unanswered["a"]
    assert "b did not answer 3 tasks" in result.table()
    assert json.loads(json.dumps(result.to_dict()))["raters"] == {"a": 6, "b": 3}
    with pytest.raises(ValueError, match="'a', 'a'"):
        score_ratings(study, [a, a])
    with pytest.raises(ValueError, match=r"\bc\b.*another"):
        score_ratings(study, [Answers("another", "c", {}, {})])


class TestBrowser:
    @pytest.fixture(scope="class")
    def browser(self) -> Iterator[Any]:
        pytest.importorskip("websocket", reason="it talks to the browser")
        from tests.browser import Browser, find_browser

        if (found := find_browser()) is None:
            pytest.skip("no Chromium is installed")
        running = Browser(found)
        yield running
        running.close()

    def test_two_raters_fill_the_form_in_and_save(self, browser: Any, tmp_path: Path) -> None:
        """Oracle: what was typed and ticked, in the saved files; no request leaves the page."""
        pytest.importorskip("krippendorff", reason="it computes the agreement")
        study = RatingStudy.make(methods(), TEXTS, RatingsConfig(features=2))
        study.export(tmp_path)
        page = browser.open((tmp_path / "form.html").as_uri())
        browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        shown = page.run("[...document.querySelectorAll('ul')].map(u => [...u.children].map(l => l.textContent))")
        assert shown == [task.shown for task in study.tasks]  # markup in a text stays text
        page.click("#save")
        assert "name" in page.run("document.getElementById('status').textContent")
        wanted = perfect(study, "Ann Ø")
        wanted.picked[study.tasks[0].id] = []
        fill(page, "Ann Ø", wanted.picked)
        reload(page, "document.getElementById('rater').value")
        assert page.run("document.getElementById('rater').value") == "Ann Ø"  # answers survive a reload
        page.click("#save")
        first = study.read_answers(saved(tmp_path / "answers-Ann-Ø.json"))
        assert first == Answers(study.id, "Ann Ø", {t: f"theme {t}" for t in wanted.picked}, wanted.picked)
        page.run("localStorage.clear(), 1")
        page.go((tmp_path / "form.html").as_uri())
        fill(page, "Bo", {task.id: [0] for task in study.tasks[1:]})
        assert page.run("document.getElementById('status').textContent") == "3 of 4 tasks answered"
        page.click("#save")
        second = study.read_answers(saved(tmp_path / "answers-Bo.json"))
        assert second.picked == {task.id: [0] for task in study.tasks[1:]}
        result = score_ratings(study, [first, second])
        ratings = [
            [float(i in a.picked[t.id]) if t.id in a.picked else math.nan for t in study.tasks for i in range(9)]
            for a in (first, second)
        ]
        assert result.alpha == pytest.approx(nominal_alpha(ratings))
        page.close()


def reload(page: Any, kept: str) -> None:
    """Load the page again until what it keeps is there: the browser hands storage over to a new process late."""
    address = page.run("location.href")
    for _ in range(40):
        page.go(address)
        if page.run(kept):
            return
        time.sleep(0.1)


def fill(page: Any, rater: str, picked: dict[str, list[int]]) -> None:
    page.run(f"rater.value = {json.dumps(rater)}, 1")
    for task, found in picked.items():
        page.run(f"document.getElementById('theme-{task}').value = 'theme {task}', 1")
        for i in found:
            page.click(f'input[name="{task}"][value="{i}"]')
        if not found:
            page.click(f'input[name="{task}"][value="0"]')
            page.click(f'input[name="none-{task}"]')  # takes the choice back


def saved(path: Path) -> Path:
    """The file, once the download is complete."""
    for _ in range(200):
        if path.is_file():
            return path
        time.sleep(0.05)
    raise AssertionError(f"{path.name} was not saved; there are {[p.name for p in path.parent.iterdir()]}")


class Scripted:
    """A rater who knows the key, or says what it is told to, one answer after the other."""

    name = "scripted"

    def __init__(self, answers: list[Any]):
        self.answers = list(answers)
        self.asked: list[Any] = []

    def complete(self, messages: Any) -> str:
        self.asked.append(messages)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)


class TestLanguageModels:
    @pytest.mark.parametrize(
        ("answer", "expected"),
        [("[1, 3]", [1, 3]), ("Sure: [2].", [2]), ("[]", []), ("1 and 3", None), ("[1] or [2]", None), ("[0]", None),
         ("[10]", None), ("[1, 1]", None), ("[1.0]", None), ("[true]", None), ("[1, x]", None), ("", None)],
    )  # fmt: skip
    def test_only_one_list_of_existing_numbers_is_an_answer(self, answer: str, expected: Any) -> None:
        """Oracle: by hand."""
        assert read_numbers(answer, 9) == expected

    def test_a_scripted_rater_is_read_right(self) -> None:
        """Oracle: the script. Unreadable answers are asked for again, with the answer and a reminder."""
        study = RatingStudy.make(methods(), TEXTS, RatingsConfig(features=1))
        first, second = study.tasks
        chat = Scripted(["a  theme\n", "the first", "[1, 2]", OSError("away"), "", "late", "[]"])
        answers = rate(study, chat)
        assert answers.picked == {first.id: [0, 1], second.id: []}
        assert answers.themes == {first.id: "a theme", second.id: "late"} and not answers.refused
        assert prompt("again", count="9") in chat.asked[2][-1]["content"]
        assert [m["role"] for m in chat.asked[2]] == ["user", "assistant", "user"]
        assert all(text.split()[0] in chat.asked[0][0]["content"] for text in first.shown)
        assert "members" not in str(chat.asked)

    def test_nonsense_is_refused_and_not_guessed(self) -> None:
        """Oracle: no answer is made up; what was refused is reported."""
        pytest.importorskip("krippendorff", reason="it computes the agreement")
        study = RatingStudy.make(methods(), TEXTS, RatingsConfig(features=1))
        chat = Scripted(["theme", "bla", "bla [a]", "[77]", "", "", ""])
        answers = rate(study, chat)
        assert answers.picked == {} and set(answers.refused) == {t.id for t in study.tasks}
        assert "[77]" in answers.refused[study.tasks[0].id] and "no theme" in answers.refused[study.tasks[1].id]
        result = score_ratings(study, [answers])
        assert result.detection == [] and "did not answer 2 tasks" in result.table()
        with pytest.raises(OSError, match="gone"):
            rate(study, Scripted([OSError("gone")] * 3))
        with pytest.raises(ValueError, match="attempts"):
            rate(study, chat, attempts=0)

    def test_answers_are_kept_and_not_asked_for_again(self, tmp_path: Path) -> None:
        """Oracle: a second run with a rater that has nothing to say."""
        study = RatingStudy.make(methods(), TEXTS, RatingsConfig(features=1))
        first = rate(study, Scripted(["a", "[1]", "b", "[2]"]), cache=tmp_path)
        assert rate(study, Scripted([]), cache=tmp_path) == first
        another = Scripted(["x"])
        another.name = "another"
        assert Cached(another, tmp_path).complete([{"role": "user", "content": "?"}]) == "x"

    def test_an_inference_client_is_asked_as_its_documentation_says(self) -> None:
        """Oracle: the signature of the real `InferenceClient.chat_completion`, and its kind of answer."""
        import inspect
        from types import SimpleNamespace

        from huggingface_hub import InferenceClient

        given: dict[str, Any] = {}

        def chat_completion(**arguments: Any) -> Any:
            inspect.signature(InferenceClient.chat_completion).bind(None, **arguments)
            given.update(arguments)
            return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content="[1]"))])

        chat = InferenceChat(SimpleNamespace(chat_completion=chat_completion), "org/model")
        assert chat.complete([{"role": "user", "content": "?"}]) == "[1]" and given["model"] == "org/model"

    def test_a_local_model_answers_with_new_tokens_only(self) -> None:
        """Oracle: the model's own greedy continuation, token by token."""
        model, tokenizer = tiny_model("llama", dtype=torch.float32), tiny_tokenizer()
        chat = LocalChat(model, tokenizer, max_tokens=4)
        messages = [{"role": "user", "content": "the cat"}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        sequence = torch.tensor([ids["input_ids"]])
        for _ in range(4):
            with torch.no_grad():
                sequence = torch.cat([sequence, model(sequence).logits[:, -1].argmax(-1, keepdim=True)], 1)
            if sequence[0, -1] == tokenizer.eos_token_id:
                break
        new = sequence[0, len(ids["input_ids"]) :]
        assert chat.complete(messages) == tokenizer.decode(new, skip_special_tokens=True)
        tokenizer.chat_template = None
        with pytest.raises(ValueError, match="tokenizer"):
            LocalChat(model, tokenizer)


class TestScript:
    def test_vectors_are_those_of_a_loop_over_terms(self) -> None:
        """Oracle: counts and logarithms by hand, term by term."""
        texts = ["ab cd", "cd", "cd ef", "cd"]
        vectors = WordVectors(texts)
        assert terms("Cd") == {"cd": 1, "~_cd": 1, "~cd_": 1}
        weight = math.log(3)  # three different texts, one of which has it; "cd" is in all and weighs nothing
        expected = {"ab": weight, "~_ab": weight, "~ab_": weight}
        row = dict(zip(vectors.places, vectors.of(["ab cd"])[0].tolist(), strict=True))
        length = sum(v * v for v in expected.values()) ** 0.5
        assert all(value == pytest.approx(expected.get(term, 0) / length) for term, value in row.items())
        assert vectors.of(["cd"]).norm() == 0

    def test_two_groups_have_the_least_squares_within(self) -> None:
        """Oracle: brute force over all ways to cut the sorted values."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            values = torch.rand(7, generator=generator).tolist()
            ordered = sorted(values, reverse=True)

            def within(k: int, ordered: list[float] = ordered) -> float:
                return sum(sum((v - sum(p) / len(p)) ** 2 for v in p) for p in (ordered[:k], ordered[k:]))

            best = min(range(1, 7), key=within)
            assert sorted((values[i] for i in two_groups(values)), reverse=True) == ordered[:best]
        assert two_groups([0.5, 0.5]) == []

    def test_it_tells_features_of_words_from_noise(self, study: RatingStudy) -> None:
        """Oracle: planted words; chance is one half in detection, one in seven for intruders."""
        answers = rate_by_words(study)
        scores = {row.method: row.accuracy for row in score_ratings(study, [answers]).detection}
        assert scores["kinds"] > 0.9 > 0.7 > scores["noise"]
        assert any(word in theme for theme in answers.themes.values() for word in KINDS)
        found = intruders_found(study, intruder_by_words(study))
        assert sum(found["kinds"]) / 3 > 0.75 > 0.4 > sum(found["noise"]) / 3
        nothing = intruders_found(study, lambda texts: None)
        assert all(value == 0 for values in nothing.values() for value in values)
