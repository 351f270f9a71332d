"""The Trainer callback: what it tells of components is true, and training does not notice it."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_npeff import ChangeReport, Decomposition, FisherConfig, IncompatibleSketchError, NPEFFAnalyzer, NPEFFCallback
from tests import tiny, warm_processes
from tests.hub_server import HubServer
from tests.logged import warned_by

ROOT = Path(__file__).parents[1]
FISHER = FisherConfig(rank=2, sketch="kronecker", sketch_dim=4)
R = 3


def bert() -> Any:
    return tiny.tiny_model("bert", vocab_size=20, dtype=torch.float32, std=0.15, hidden_dropout_prob=0.2)


def with_lora() -> Any:
    torch.manual_seed(0)
    return get_peft_model(
        bert(), LoraConfig(r=2, target_modules=["query", "dense"], lora_dropout=0.1, task_type="SEQ_CLS")
    )


UNTRAINED = bert()
TRAIN = tiny.tiny_batch(UNTRAINED, 24, seed=1, labels=True)
PROBE = [
    {**row, "id": f"probe-{i}", "text": f"secret {i}"} for i, row in enumerate(tiny.tiny_batch(UNTRAINED, 13, seed=2))
]
PAD = SimpleNamespace(pad_token_id=tiny.PAD)


def callback(**settings: Any) -> NPEFFCallback:
    own = {} if "decomposition" in settings else {"n_components": R, "fisher": FISHER, "n_restarts": 2}
    return NPEFFCallback(PROBE, **({"every": 2, "processing_class": PAD} | own | settings))


def run(folder: Path, added: NPEFFCallback | None = None, model: Any = None, **options: Any) -> Trainer:
    """A short training with dropout, shuffling and a loss logged at every step."""
    resume, reporters = options.pop("resume", None), options.pop("reporters", None)
    trainer_class = options.pop("trainer", Trainer)
    model = bert() if model is None else model
    defaults = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    trainer = trainer_class(
        model,
        TrainingArguments(str(folder), **(defaults | quiet | options)),
        data_collator=lambda rows: tiny.collate(rows, UNTRAINED),
        train_dataset=TRAIN,  # type: ignore[arg-type]
        eval_dataset=TRAIN[:4],  # type: ignore[arg-type]
        callbacks=reporters,
    )
    if added is not None:
        trainer.add_callback(added)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Trainer) -> list[tuple[int, float, float]]:
    logs = trainer.state.log_history
    return [(log["step"], log["loss"], log["grad_norm"]) for log in logs if "loss" in log]


SITUATIONS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (bert, {}),
    "gradient accumulation": (bert, {"gradient_accumulation_steps": 3}),
    "bf16": (bert, {"bf16": True}),
    "PEFT": (with_lora, {}),
    "evaluation, gradient checkpointing": (
        bert,
        {"eval_strategy": "steps", "eval_steps": 2, "gradient_checkpointing": True},
    ),
}


Followed = Callable[[str], tuple[Trainer, NPEFFCallback, tuple[float, ...]]]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Followed:
    """A situation → its training with the callback, and random numbers drawn afterwards; each is trained once."""

    @functools.cache
    def training(name: str) -> tuple[Trainer, NPEFFCallback, tuple[float, ...]]:
        make, options = SITUATIONS[name]
        added = callback()
        random.seed(0)
        trainer = run(tmp_path_factory.mktemp("followed"), added, make(), **options)
        return trainer, added, noise()

    return training


def noise() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", SITUATIONS)
def test_training_is_the_same_bit_for_bit_with_and_without_the_callback(
    name: str, tmp_path: Path, followed: Followed
) -> None:
    """Oracle: the run without it at the same seed: losses, gradient norms, weights and random state are equal."""
    make, options = SITUATIONS[name]
    random.seed(0)
    plain = run(tmp_path, None, make(), **options)
    drawn = noise()
    with_it, added, drawn_with_it = followed(name)
    ends = []
    for trainer, after in ((plain, drawn), (with_it, drawn_with_it)):
        ends.append((losses(trainer), after, trainer.model.state_dict()))
        assert all(p.requires_grad for p in trainer.model.parameters()) or name == "PEFT"
    assert [record["step"] for record in added.history] == [2, 4, 6]
    assert len(ends[0][0]) == 6 and ends[0][:2] == ends[1][:2]
    assert all(torch.equal(value, ends[1][2][key]) for key, value in ends[0][2].items())


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_last_point_is_the_decomposition_of_the_trained_models_own_pefs(name: str, followed: Followed) -> None:
    """Oracle: the weights in a fresh model, a fresh analyzer, and the loss with every d × d matrix formed."""
    trainer, added, _ = followed(name)
    model = SITUATIONS[name][0]()
    model.load_state_dict(trainer.model.state_dict())
    last = added.decomposition_
    assert last is not None
    pefs = NPEFFAnalyzer(model, PAD).compute_pefs(PROBE, like=last)
    A, W, G = pefs.factors.double(), last.coefficients.double(), last.pseudo_fishers.double()
    F = torch.einsum("ncd,nce->nde", A, A)
    residual = F - torch.einsum("nr,rd,re->nde", W, G, G)
    explained = 1 - float(residual.square().sum() / F.square().sum())
    assert 0.05 < explained < 1
    assert added.history[-1]["explained"] == pytest.approx(explained, abs=1e-5)
    assert last.example_ids == [row["id"] for row in PROBE]


Saved = tuple[Path, Trainer, NPEFFCallback]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A training with checkpoints: their folder, the trainer and the callback. Nobody writes to it."""
    folder, added = tmp_path_factory.mktemp("saved"), callback()
    return folder, run(folder, added, save_strategy="steps", save_steps=2), added


@pytest.fixture(scope="module")
def resumed(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> NPEFFCallback:
    """The callback of the training that went on from the first checkpoint of `saved`."""
    folder, added = tmp_path_factory.mktemp("resumed"), callback()
    checkpoint = shutil.copytree(saved[0] / "checkpoint-2", folder / "checkpoint-2")
    run(folder, added, resume=str(checkpoint))
    return added


def test_drift_and_shares_are_what_the_files_of_two_checkpoints_say(saved: Saved) -> None:
    """Oracle: NumPy on the decompositions read back from disk; components keep their numbers while they move."""
    folder, trainer, added = saved
    before, now = (Decomposition.load(folder / f"checkpoint-{step}" / "npeff") for step in (4, 6))
    lines = (folder / "checkpoint-6" / "npeff" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == added.history
    record = added.history[-1]
    for j in range(R):
        g, h = now.pseudo_fishers[j].numpy(), before.pseudo_fishers[j].numpy()
        w, v = now.coefficients[:, j].numpy(), before.coefficients[:, j].numpy()
        assert record["cosine"][j] == pytest.approx(abs(float(g @ h)), abs=1e-5)
        assert record["correlation"][j] == pytest.approx(float(np.corrcoef(w, v)[0, 1]), abs=1e-5)
        leading = now.coefficients.numpy().argmax(1) == j
        assert record["share"][j] == pytest.approx(leading.mean(), abs=1e-6)
    W = now.coefficients
    active = {j for row in W for j in range(R) if row[j] > 0.05 * row.sum()}
    assert record["active"] == len(active)
    assert min(record["cosine"]) > 0.3 and max(record["cosine"]) < 1 - 1e-6, "they moved, and were not exchanged"
    assert added.history[0]["cosine"] is None and added.history[0]["correlation"] is None
    logged = [log for log in trainer.state.log_history if "npeff/explained" in log]
    assert [log["step"] for log in logged] == [2, 4, 6]
    assert logged[-1]["npeff/share/0"] == record["share"][0] and "npeff/cosine/0" not in logged[0]


def test_a_given_decomposition_stays_and_its_coefficients_are_followed(tmp_path: Path) -> None:
    """Oracle: `transform` of the trained model's PEFs."""
    analyzer = NPEFFAnalyzer(bert(), PAD, fisher=FISHER)
    given = analyzer.decompose(analyzer.compute_pefs(PROBE), R, n_restarts=1)
    given.rename(1, "a name")
    added = callback(decomposition=given, every="epoch", on_start=True)
    trainer = run(tmp_path, added, num_train_epochs=2, max_steps=-1)
    assert [record["step"] for record in added.history] == [0, 6, 12]
    last = added.decomposition_
    assert last is not None and last.names == {1: "a name"}
    assert torch.equal(last.pseudo_fishers, given.pseudo_fishers)
    W = given.transform(NPEFFAnalyzer(trainer.model, PAD).compute_pefs(PROBE, like=given))
    torch.testing.assert_close(last.coefficients, W, rtol=0, atol=1e-6)
    assert not torch.allclose(W, given.coefficients, atol=1e-3), "training changed something"
    assert added.history[0]["explained"] == pytest.approx(given.explained, abs=1e-5)
    assert all(record["cosine"] is None for record in added.history)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(saved: Saved, resumed: NPEFFCallback) -> None:
    """Oracle: the run that was left alone; points before the checkpoint come from it, later ones are the same."""
    assert [record["step"] for record in resumed.history] == [2, 4, 6]
    assert resumed.history == saved[2].history


def test_resuming_from_a_checkpoint_without_points_or_with_other_components_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the history, which begins after the checkpoint, and the warning."""
    run(tmp_path, None, max_steps=2, save_strategy="steps", save_steps=2)
    for added, words in ((callback(), "has no points"), (callback(n_components=2), "has 3 components, not 2")):
        caplog.clear()
        run(tmp_path, added, resume=str(tmp_path / "checkpoint-2"), max_steps=4, save_strategy="steps", save_steps=2)
        assert words in caplog.text
        assert [record["step"] for record in added.history] == [4]
        shutil.copytree(tmp_path / "checkpoint-4" / "npeff", tmp_path / "checkpoint-2" / "npeff", dirs_exist_ok=True)


def test_the_tensorboard_event_file_holds_every_scalar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: TensorBoard's own reader on what a plain `add_callback` left."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    added = callback(on_start=True)
    run(tmp_path, added, report_to="tensorboard")
    events = reader.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert sum(tag.startswith("train/npeff/") for tag in tags) == 2 + 3 * R
    for name, values in (
        ("explained", [record["explained"] for record in added.history]),
        ("active", [record["active"] for record in added.history]),
        ("share/2", [record["share"][2] for record in added.history]),
        ("cosine/0", [record["cosine"][0] for record in added.history[1:]]),
    ):
        found = [(event.step, event.value) for event in events.Scalars(f"train/npeff/{name}")]
        assert [step for step, _ in found] == [0, 2, 4, 6][-len(values) :]
        assert [value for _, value in found] == pytest.approx(values, rel=1e-6)
    assert len(events.Scalars("train/loss")) == 6, "Trainer's own log of a step with a point is not lost"


def test_points_tell_accuracy_and_what_examples_have_in_common(tmp_path: Path) -> None:
    """Oracle: accuracy counted from the last decomposition's own columns; and the planted column of half the probe."""
    probe = [{**row, "label": i % 2, "cue": "here" if i % 2 else "not"} for i, row in enumerate(PROBE * 2)]
    for i, row in enumerate(probe):
        row["id"] = f"probe-{i}"
    added = NPEFFCallback(probe, every=3, n_components=R, fisher=FISHER, n_restarts=2, processing_class=PAD)
    trainer = run(tmp_path, added)
    last, found = added.history[-1], added.decomposition_
    assert found is not None
    expected = found.associations()
    assert last["accuracy"] == [None if one.accuracy is None else one.accuracy[0] for one in expected]
    assert any(value is not None for value in last["accuracy"])
    assert last["association"] == [one.associations[0].feature if one.associations else None for one in expected]
    for j, one in enumerate(expected):
        values = [log.get(f"npeff/associated/{j}") for log in trainer.state.log_history if log["step"] == last["step"]]
        assert (one.associations[0].share if one.associations else None) in values


def test_the_end_of_training_says_what_changed_from_the_first_point(tmp_path: Path) -> None:
    """Oracle: the KL of every probe example between the model before and the trained one, by transformers."""
    before, added = bert(), callback(on_start=True)
    trainer = run(tmp_path, added)
    report = added.report_
    assert report is not None and ChangeReport.load(tmp_path / "npeff") == report
    assert report.change["before"] == "step 0" and report.change["after"] == "step 6" and report.norm is None
    model = trainer.model.eval()
    for i in (0, 5, 12):
        with torch.no_grad():
            p, q = (
                each(input_ids=torch.tensor([PROBE[i]["input_ids"]])).logits[0].double().log_softmax(-1)
                for each in (before, model)
            )
        assert report.kl[i] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3, abs=1e-7)
    assert len(report.components) == R and all(each.growth is not None for each in report.components)


def test_the_report_of_a_resumed_run_says_where_it_begins(saved: Saved, resumed: NPEFFCallback) -> None:
    """Oracle: the steps of both runs' points; the run that was left alone says nothing of the kind."""
    whole = saved[2]
    assert whole.report_ is not None and resumed.report_ is not None
    assert (whole.report_.change["before"], resumed.report_.change["before"]) == ("step 2", "step 4")
    told = [note for note in resumed.report_.notes if "resumed from the checkpoint of step 2" in note]
    assert len(told) == 1 and "up to step 4" in told[0]
    assert not any("resumed" in note for note in whole.report_.notes)


class Reporter(TrainerCallback):
    """What a tracker (trackio, W&B) is handed, which all listen to `on_log`."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, Any]]] = []

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append((state.global_step, dict(logs)))


def test_every_reporter_gets_plain_numbers_and_no_progress_bar_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: what a reporter's `on_log` was handed against the callback's own history; the process's stderr."""
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    added, reporter = callback(on_start=True), Reporter()
    run(tmp_path, added, reporters=[reporter])
    points = [(step, logs) for step, logs in reporter.seen if "npeff/explained" in logs]
    assert [step for step, _ in points] == [0, 2, 4, 6]
    for (_, logs), record in zip(points, added.history, strict=True):
        assert all(type(value) in (int, float) for value in logs.values()), logs
        for name in ("explained", "active"):
            assert logs[f"npeff/{name}"] == record[name]
        for name in ("share", "cosine", "correlation"):
            assert [logs.get(f"npeff/{name}/{j}") for j in range(R)] == (record[name] or [None] * R)
    assert "PEFs:" not in capfd.readouterr().err


def test_evaluations_of_unchanged_weights_make_one_point_and_max_points_ends_them(tmp_path: Path) -> None:
    """Oracle: the steps in the history, with two evaluation sets and an evaluation after training."""
    added = callback(every="eval", max_points=2).attach(trainer := Trainer(
        bert(),
        TrainingArguments(str(tmp_path), max_steps=6, eval_strategy="steps", eval_steps=2, use_cpu=True,
                          report_to="none", disable_tqdm=True, save_strategy="no"),
        data_collator=lambda rows: tiny.collate(rows, UNTRAINED),
        train_dataset=TRAIN,  # type: ignore[arg-type]
        eval_dataset={"a": TRAIN[:4], "b": TRAIN[4:8]},  # type: ignore[dict-item]
    ))  # fmt: skip
    trainer.train()
    assert [record["step"] for record in added.history] == [2, 4]
    added.max_points = None
    trainer.evaluate()
    assert [record["step"] for record in added.history] == [2, 4, 6]
    trainer.evaluate()
    assert len(added.history) == 3


def test_a_probe_that_fails_leaves_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: mode, requires_grad, hooks and forward pass after an error in the middle of the pass, under autocast."""
    seen: dict[str, Any] = {}

    def fails(self: Any, pefs: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr("hf_npeff.decomposition.estimator.NPEFF.fit", fails)
    added = callback()
    original = added._point

    def point(*args: Any, **kwargs: Any) -> None:
        seen["model"], seen["forward"] = kwargs["model"], kwargs["model"].forward
        original(*args, **kwargs)

    monkeypatch.setattr(added, "_point", point)
    with pytest.raises(RuntimeError, match="planted"):
        run(tmp_path, added, bf16=True)
    model = seen["model"]
    assert "_original_forward" in vars(model) and model.forward == seen["forward"]
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_without_a_trainer_the_scalars_stay_in_the_state_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: events called by hand, as by another training loop."""
    added, state = callback(), TrainerState(global_step=2)
    arguments = TrainingArguments("nowhere", use_cpu=True, report_to="none")
    added.on_step_end(arguments, state, TrainerControl(), model=bert().train())
    assert len(warned_by(caplog, "callback")) == 1
    assert [log["npeff/explained"] for log in state.log_history] == [added.history[0]["explained"]]


@pytest.mark.parametrize(
    ("probe", "settings", "error", "words"),
    [
        ([], {}, ValueError, "probe"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, {}, ValueError, "empty"),
        (iter([]), {"max_examples": 4}, ValueError, "probe"),
        (iter(["a"]), {}, ValueError, "max_examples"),
        (7, {}, ValueError, "int"),
        (["a"], {"every": 0}, ValueError, "every.*0"),
        (["a"], {"every": True}, ValueError, "every.*True"),
        (["a"], {"every": "step"}, ValueError, "every.*'step'"),
        (["a"], {"batch_size": 0}, ValueError, "batch_size"),
        (["a"], {"max_points": 0}, ValueError, "max_points"),
        (["a"], {"n_components": 5}, ValueError, "n_components=5.*4"),
        (["a"], {"n_components": 1, "n_restarts": 0}, ValueError, "n_restarts"),
        (["a"], {"n_components": 1, "restarts": 1}, TypeError, "restarts"),
        (["a"], {"decomposition": "user/name"}, TypeError, "from_pretrained"),
    ],
)
def test_bad_arguments_are_refused_at_construction(probe: Any, settings: Any, error: Any, words: str) -> None:
    """Oracle: the error and the words that tell what to change."""
    with pytest.raises(error, match=words):
        NPEFFCallback(probe, **settings)


def test_a_decomposition_of_another_model_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """Oracle: no step was taken; settings that a decomposition brings itself are refused even earlier."""
    other = NPEFFAnalyzer(tiny.tiny_model("bert", vocab_size=20, num_labels=5, dtype=torch.float32), PAD, fisher=FISHER)
    given = other.decompose(other.compute_pefs(PROBE), R, n_restarts=1)
    with pytest.raises(ValueError, match="n_components, fisher"):
        NPEFFCallback(PROBE, n_components=R, decomposition=given)
    with pytest.raises(IncompatibleSketchError, match=r"classifier\.weight"):
        run(tmp_path, callback(decomposition=given))


# Processes and the Hub


def two_processes(folder: Path) -> None:
    """What each of two processes does: the run without the callback, and with it."""
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    plain = run(folder / "plain", None, gradient_accumulation_steps=2)
    added = callback()
    trainer = run(folder / "with", added, gradient_accumulation_steps=2, save_strategy="steps", save_steps=6)
    equal = all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), trainer.model.parameters(), strict=True))
    result = {"equal": equal, "losses": [losses(plain), losses(trainer)], "history": added.history}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    torch.save(trainer.model.state_dict(), folder / f"{rank}.pt")


def test_two_processes_train_the_same_and_tell_the_same_of_the_same_weights(tmp_path: Path) -> None:
    """Oracle: the two-process run without the callback, bit for bit; one process on the trained weights."""
    for done in warm_processes.two_of_torch(["-m", "tests.test_callback", tmp_path]):
        assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for result in (first, second):
        assert result["equal"] and result["losses"][0] == result["losses"][1]
    assert len(first["losses"][0]) == 6
    assert first["history"] == second["history"] and [r["step"] for r in first["history"]] == [2, 4, 6]
    assert not list((tmp_path / "with").glob("_npeff*")), "the shared folder is gone"
    last = Decomposition.load(tmp_path / "with" / "checkpoint-6" / "npeff")
    model = bert()
    model.load_state_dict(torch.load(tmp_path / "0.pt"))
    pefs = NPEFFAnalyzer(model, PAD).compute_pefs(PROBE, like=last)
    torch.testing.assert_close(last.transform(pefs), last.coefficients, rtol=0, atol=1e-5)


def pushing(folder: Path) -> None:
    """A run that pushes every checkpoint."""
    options = {"push_to_hub": True, "hub_model_id": "alice/trained", "hub_strategy": "checkpoint", "max_steps": 4}
    trainer = run(folder, callback(push=True), save_strategy="steps", save_steps=4, **options)
    trainer.push_to_hub()


def test_the_decomposition_travels_with_the_model_without_the_probes_texts(tmp_path: Path) -> None:
    """Oracle: the files in a loopback Hub's repository, read back as any folder."""
    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        command = ["-m", "tests.test_callback", "push", tmp_path / "run"]
        done = warm_processes.run(command, env=hub.env(token="hf_alice", home=tmp_path / "home"))
        assert done.returncode == 0, done.stderr[-3000:]
        files = hub.repos["alice/trained"].files()
    assert {"config.json", "model.safetensors", "README.md"} <= files.keys()
    assert not [name for name in files if "_npeff" in name]
    for prefix in ("npeff/", "last-checkpoint/npeff/"):
        folder = tmp_path / prefix.replace("/", "-")
        folder.mkdir()
        for name in files:
            if name.startswith(prefix):
                content = files[name]
                (folder / name.removeprefix(prefix)).write_bytes(getattr(content, "data", content))
        assert "secret" not in "".join(path.read_bytes().decode("latin-1") for path in folder.iterdir())
        pushed = Decomposition.load(folder)
        assert pushed.example_ids[0] == "probe-0" and "text" not in pushed.columns
        assert len((folder / "history.jsonl").read_text().splitlines()) == 2


if __name__ == "__main__":
    if sys.argv[1] == "push":
        pushing(Path(sys.argv[2]))
    else:
        two_processes(Path(sys.argv[1]))


@pytest.mark.parametrize(("rank", "classes", "enough"), [(1, 5, 8), (4, 3, 4)])
def test_exact_factors_have_as_many_rows_as_the_model_has_classes(
    tmp_path: Path, rank: int, classes: int, enough: int
) -> None:
    """Oracle: k − 1 rows an example, above `rank` or below it: as many components train, and one more is refused."""
    fisher = FisherConfig(rank=rank, output_factor="exact", sketch="kronecker", sketch_dim=4)
    model = tiny.tiny_model("bert", "sequence-classification", num_labels=classes, vocab_size=20, dtype=torch.float32)
    probe = [{"sentence": "a", "other": "the cat sees"}, {"sentence": "a dog", "other": "one two three"}]
    settings: dict[str, Any] = {"fisher": fisher, "n_restarts": 1, "every": 1, "text_column": "other"}
    words = tiny.tiny_tokenizer()
    words_of = {"processing_class": words, **settings}
    made = NPEFFCallback(probe, n_components=enough, **words_of)
    run(tmp_path / "enough", made, tiny.tiny_model("bert", num_labels=classes, dtype=torch.float32), max_steps=1)
    assert made.decomposition_ is not None and made.decomposition_.texts == ["the cat sees", "one two three"]
    with pytest.raises(ValueError, match=f"more than the {enough} rows"):
        run(tmp_path / "more", NPEFFCallback(probe, n_components=enough + 1, **words_of), model, max_steps=1)


class Waiting(Trainer):  # type: ignore[misc]
    """Hands a metric of each step to whatever is logged next, as TRL's trainers do."""

    waiting: dict[str, float] = {}  # noqa: RUF012

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.waiting = {"entropy": 1.0 + self.state.global_step}
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any) -> None:
        super().log({**logs, **self.waiting}, *args)
        self.waiting = {}


def test_metrics_that_wait_in_a_trainer_stay_with_it(tmp_path: Path) -> None:
    """Oracle: the records of the same training without a callback."""
    plain = run(tmp_path / "plain", trainer=Waiting)
    followed = run(tmp_path / "followed", callback(every=1), trainer=Waiting)
    waited = [[log.get("entropy") for log in each.state.log_history if "loss" in log] for each in (plain, followed)]
    assert waited[0] == waited[1] == [1, 2, 3, 4, 5, 6]
    ours = [log for log in followed.state.log_history if "npeff/explained" in log]
    assert len(ours) == 6 and not any("entropy" in log for log in ours)
