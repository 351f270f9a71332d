"""Several processes, processes that are killed, and memory that runs out: the result is that of one quiet process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_npeff import NPEFF, NPEFFError, ParameterDirection, PEFs
from hf_npeff.fisher.compute import _missing
from hf_npeff.fisher.rows import RowMaker
from tests import planted, warm_processes, workers
from tests.logged import warned_by
from tests.systems import linux_only

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that two processes compute and fit."""
    folder = tmp_path_factory.mktemp("two")
    for done in warm_processes.two_of_torch(["-m", "tests.workers", "everything", folder]):
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("n", workers.COUNTS)
def test_two_processes_compute_what_one_computes(two: Path, n: int, tmp_path: Path) -> None:
    """Oracle: one process; ids, contents and predictions in the same order, values to 1e-5; n = 1 leaves one idle."""
    ours = PEFs.load(two / f"pefs-{n}")
    one = workers.analyzer().compute_pefs(workers.examples(n), tmp_path / "one", batch_size=2, shard_size=3)
    assert ours.example_ids == one.example_ids
    assert ours.columns == one.columns
    assert torch.equal(ours.predictions, one.predictions)
    assert ours.fingerprint == one.fingerprint
    torch.testing.assert_close(ours.norms, one.norms, rtol=1e-5, atol=0)
    for i in range(n):
        torch.testing.assert_close(ours.gram(i), one.gram(i), rtol=0, atol=1e-5)
    if n > 1:
        starts = [s["start"] for s in json.loads((two / f"pefs-{n}" / "manifest.json").read_text())["shards"]]
        assert n // 2 in starts, "the second process begins in the middle"


@pytest.mark.parametrize("name", workers.PROBLEMS)
def test_two_processes_fit_what_one_fits(two: Path, name: str) -> None:
    """Oracle: both processes bit for bit, and one process to 1e-5 of its loss."""
    first, second = (torch.load(two / f"{name}-{rank}.pt") for rank in (0, 1))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    W, G, losses, _ = first
    one = workers.fit(name)
    assert W.shape == one.coefficients.shape and G.shape == one.pseudo_fishers.shape
    assert abs(losses[-1] - one.loss_history[-1]) <= 1e-5
    cosines = (G @ one.pseudo_fishers.T).abs().amax(1)
    assert float(cosines.min()) > 0.99 or name == "fewer examples than processes"


def test_every_process_lifts_and_edits_what_one_does(two: Path) -> None:
    """Oracle: one process without torch.distributed; the second step of the edit computes rows again."""
    alone = workers.changes(PEFs.load(two / "pefs-11"))
    assert len(alone["edit"].info["steps"]) == 2
    for name, change in alone.items():
        for rank in (0, 1):
            deltas, steps = torch.load(two / f"{name}-{rank}.pt")
            assert steps == change.info.get("steps")
            assert change.cosine(deltas) == pytest.approx(1, abs=1e-6)
            length = sum(float(value.double().square().sum()) for value in deltas.values()) ** 0.5
            assert length == pytest.approx(change.norm, rel=1e-5)


def test_a_ddp_model_gives_what_the_model_inside_it_gives(two: Path) -> None:
    """Oracle: the same processes on the model itself, names and fingerprint included."""
    ours, theirs = PEFs.load(two / "ddp"), PEFs.load(two / "pefs-5")
    assert ours.fingerprint == theirs.fingerprint
    assert torch.equal(ours.factors, theirs.factors)


def test_accelerate_starts_two_processes_on_cpus_by_this_config_file(two: Path, tmp_path: Path) -> None:
    """Oracle: the store that two processes of torch.distributed wrote; a lone process writes other shards.

    The config file is the one in docs/models.md.
    """
    text = (ROOT / "docs" / "models.md").read_text()
    (tmp_path / "two.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    launcher = ["-m", "accelerate.commands.launch", "--config_file", tmp_path / "two.yaml"]
    done = warm_processes.launched(launcher, ["-m", "tests.workers", "one_store", tmp_path / "store"])
    assert done.returncode == 0, done.stderr
    for path in (two / "pefs-5").glob("pefs-*.safetensors"):
        assert (tmp_path / "store" / path.name).read_bytes() == path.read_bytes()


@pytest.fixture(scope="module")
def in_pieces(two: Path) -> Path:
    """What two processes compute with half of every weight each."""
    return two / "sharded"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", workers.SHARDED)
def test_a_model_sharded_by_fsdp_gives_what_the_whole_model_gives(in_pieces: Path, name: str, tmp_path: Path) -> None:
    """Oracle: one process with the whole model; PEFs to 1e-5. Shares are uneven, one is empty, passes differ in number.

    The model comes back in the same pieces and bit for bit.
    """
    plain, data = workers.sharded_problem(name)
    one = plain.compute_pefs(data, tmp_path / "one", batch_size=2, shard_size=3)
    ours = PEFs.load(in_pieces / name)
    assert ours.example_ids == one.example_ids
    assert ours.fingerprint == one.fingerprint and ours.info["weights"] == one.info["weights"]
    assert torch.equal(ours.predictions, one.predictions)
    torch.testing.assert_close(ours.norms, one.norms, rtol=1e-5, atol=0)
    for i in range(len(data)):
        torch.testing.assert_close(ours.gram(i), one.gram(i), rtol=0, atol=1e-5)
    assert ours.info["selftest"]["row_error"] is None, "weights in pieces are not compared with autograd"
    for rank in (0, 1):
        assert torch.load(in_pieces / f"{name}-{rank}.pt")[0], "weights or requires_grad changed"


def test_components_lift_through_a_sharded_model(in_pieces: Path, tmp_path: Path) -> None:
    """Oracle: the whole model in one process, for the same decomposition up to sign; to 1e-4 of the unit norm."""
    plain, data = workers.sharded_problem("llama")
    pefs = plain.compute_pefs(data, tmp_path / "one", batch_size=2, shard_size=3)
    direction = plain.lift(NPEFF(2, n_restarts=1).fit(pefs), 0, pefs, data, selective=False)
    for rank in (0, 1):
        ours = torch.load(in_pieces / f"llama-{rank}.pt")[1]
        assert set(ours) == set(direction)
        assert direction.cosine(ours) ** 2 > 1 - 1e-4


def test_adapters_lift_through_a_sharded_model(in_pieces: Path) -> None:
    """Oracle: the direction that the same processes lift; rank 16 is all of a tiny weight. To 1e-4 of the unit norm."""
    for rank in (0, 1):
        direction = torch.load(in_pieces / f"llama-{rank}.pt")[1]
        made = torch.load(in_pieces / f"adapters-{rank}.pt", weights_only=False)
        assert set(made) == set(direction)
        for name, delta in made.items():
            assert (delta.matrix() - direction[name]).norm() < 1e-4


def test_processes_share_the_examples_of_adapters_out(two: Path) -> None:
    """Oracle: one process, for the same decomposition up to sign; what is on disk is what both have."""
    plain = workers.analyzer()
    pefs = PEFs.load(two / "pefs-11")
    found = NPEFF(2, n_restarts=1).fit(pefs)
    truth = plain.lift_adapters(found, pefs, workers.examples(11), 2, selective=False)
    made = [torch.load(two / f"adapters-{rank}.pt") for rank in (0, 1)]
    for j, adapter in enumerate(truth):
        written = load_file(two / "adapters" / f"component-{j}" / "adapter_model.safetensors")
        assert all(torch.equal(written[n], each[j][n]) for each in made for n in written)
        ours = replace(adapter, tensors=written)
        deltas = [{n: a.delta(n).double() for n in a.layouts} for a in (adapter, ours)]
        inner = sum(float((deltas[0][n] * deltas[1][n]).sum()) for n in deltas[0])
        norms = [sum(float(d.square().sum()) for d in each.values()) for each in deltas]
        assert inner**2 / norms[0] / norms[1] > 1 - 1e-4


def test_a_direction_is_measured_on_a_sharded_model(in_pieces: Path) -> None:
    """Oracle: the whole model in one process; mean KL of top examples and of others, to 1e-4."""
    plain, data = workers.sharded_problem("bert")
    decomposition = NPEFF(2, n_restarts=1).fit(PEFs.load(in_pieces / "bert"))
    name = plain.maps[0].parameter
    direction = ParameterDirection({name: torch.ones(plain.maps[0].shape)}, {name: "linear"})
    report = plain.evaluate_direction(direction, decomposition, 0, data, scale=0.5, n_top=3)
    for rank in (0, 1):
        top, others = json.loads((in_pieces / f"evaluated-{rank}.json").read_text())
        assert (top, others) == pytest.approx((report.best.top, report.best.others), rel=1e-4)


def test_components_are_followed_while_a_sharded_model_trains(two: Path, tmp_path: Path) -> None:
    """Oracle: the same training without the callback, bit for bit; the whole model in one process, to 1e-4."""
    model = workers.tiny.tiny_model("llama", vocab_size=20, dtype=torch.float32, tie_word_embeddings=False)
    one = workers.trained(model, tmp_path, follow=True)
    for rank in (0, 1):
        ours, plain = (json.loads((two / f"followed-{follow}-{rank}.json").read_text()) for follow in (True, False))
        assert ours["losses"] == plain["losses"]
        assert ours["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert [point["step"] for point in ours["history"]] == [1, 2, 3]
        assert [point["explained"] for point in ours["history"]] == pytest.approx(
            [point["explained"] for point in one["history"]], abs=1e-4
        )
        assert ours["kl"] == pytest.approx(one["kl"], rel=1e-3) and ours["kl"] > 0


def test_what_a_sharded_model_cannot_do_is_refused_with_the_way_out(in_pieces: Path) -> None:
    """Oracle: the messages, of both processes."""
    for rank in (0, 1):
        refused = json.loads((in_pieces / f"refused-{rank}.json").read_text())
        assert "give a whole number" in refused["auto"]
        assert "load the whole model in one process" in refused["apply"]
        assert "sharded, so they cannot be differentiated" in refused["parameters"]
        assert "shard it only with FSDP2 (fully_shard)" in refused["tensor parallel"]


def test_an_accelerator_that_missed_the_other_processes_is_refused(monkeypatch: Any) -> None:
    """Oracle: on CPUs `Accelerator()` starts as many lone processes, which would all write all shards."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = workers.analyzer()
    alone._accelerator = SimpleNamespace(num_processes=1, process_index=0)
    with pytest.raises(ValueError, match=r"2.*Accelerator\(cpu=True\)"):
        alone.compute_pefs(workers.examples(2))


def test_a_worker_that_dies_stops_the_others_and_finished_shards_stay(tmp_path: Path) -> None:
    """Oracle: the second of two processes exits in its second shard; another run, alone, needs only the rest."""
    folder = tmp_path / "store"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = warm_processes.launched(launcher, ["-m", "tests.workers", "dies", folder])
    assert done.returncode != 0
    assert "exitcode  : 3" in done.stderr, done.stderr[-2000:]
    kept = {path.stem: path.read_bytes() for path in folder.glob("pefs-*.safetensors")}
    assert "pefs-00006" in kept and "pefs-00008" not in kept
    pefs = workers.analyzer().compute_pefs(workers.examples(12), folder, batch_size=2, shard_size=2)
    assert {name: (folder / f"{name}.safetensors").read_bytes() for name in kept} == kept
    whole = workers.analyzer().compute_pefs(workers.examples(12), tmp_path / "whole", batch_size=2, shard_size=2)
    assert pefs.example_ids == whole.example_ids
    torch.testing.assert_close(pefs.factors, whole.factors, rtol=0, atol=1e-5)


@linux_only("os.fork with torch's threads")
def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """Oracle: every file of a run that was left alone, after SIGKILL at 12 random moments and a second run each."""
    done = warm_processes.run(["-m", "tests.workers", "kills", tmp_path])
    assert done.returncode == 0, done.stderr
    left = json.loads((tmp_path / "left.json").read_text())
    assert len(set(left)) >= 4, f"the kills came at too few different moments: {left}"
    whole = contents(tmp_path / "whole")
    assert "manifest.json" in whole
    for i in range(workers.KILLS):
        assert contents(tmp_path / f"killed-{i}") == whole


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("done", "size", "missing"),
    [
        ({}, 4, [(0, 4), (4, 8), (8, 10)]),
        ({0: 4}, 4, [(4, 8), (8, 10)]),
        ({4: 4}, 4, [(0, 4), (8, 10)]),
        ({2: 3, 7: 1}, 4, [(0, 2), (5, 7), (8, 10)]),
        ({0: 10}, 4, []),
        ({0: 12}, 4, []),
        ({9: 5}, 4, [(0, 4), (4, 8), (8, 9)]),
    ],
)
def test_a_resumed_run_fills_the_gaps_whatever_run_left_them(
    done: dict[int, int], size: int, missing: list[tuple[int, int]]
) -> None:
    """Oracle: gaps of examples 0 to 9, read off by eye; another shard size or number of processes leaves such gaps."""
    assert [(part.start, part.stop) for part in _missing(range(10), done, size)] == missing


def test_a_share_that_begins_inside_a_finished_shard_begins_after_it() -> None:
    """Oracle: examples 5 to 9, of which a shard of 4 to 6 is there."""
    assert [*_missing(range(5, 10), {4: 3}, 4)] == [range(7, 10)]


def out_of_memory_above(limit: int, seen: list[int], monkeypatch: Any, length: int = 1) -> None:
    rows = RowMaker.rows

    def limited(self: Any, examples: Any) -> Any:
        if self.selftest is None:  # the self-test's own rows
            return rows(self, examples)
        seen.append(len(examples))
        if len(examples) * max(e.length for e in examples) > limit:
            raise torch.OutOfMemoryError("simulated")
        return rows(self, examples)

    monkeypatch.setattr(RowMaker, "rows", limited)


def test_batch_size_auto_halves_until_memory_suffices_and_loses_no_example(monkeypatch: Any, caplog: Any) -> None:
    """Oracle: the run with plenty of memory; batches of 24 tokens fit here."""
    whole = workers.analyzer().compute_pefs(workers.examples(12), batch_size="auto")
    seen: list[int] = []
    out_of_memory_above(24, seen, monkeypatch)
    pefs = workers.analyzer().compute_pefs(workers.examples(12), batch_size="auto")
    assert seen[0] == 12 and seen[1] <= 6
    assert warned_by(caplog, "fisher.compute")
    assert pefs.example_ids == whole.example_ids
    torch.testing.assert_close(pefs.factors, whole.factors, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("batch_size", "advice"), [(4, "batch_size='auto'"), ("auto", "shorter examples")])
def test_memory_that_never_suffices_is_an_error_with_advice(batch_size: Any, advice: str, monkeypatch: Any) -> None:
    """Oracle: the message; a fixed batch size is never changed behind one's back."""
    seen: list[int] = []
    out_of_memory_above(0, seen, monkeypatch)
    with pytest.raises(NPEFFError, match=advice):
        workers.analyzer().compute_pefs(workers.examples(6), batch_size=batch_size)
    assert seen[-1] == (1 if batch_size == "auto" else 4)


def test_batch_size_auto_bounds_the_padded_tokens_of_a_batch(monkeypatch: Any) -> None:
    """Oracle: the budget; no batch of several examples pads to more."""
    monkeypatch.setattr("hf_npeff.fisher.compute._AUTO_TOKENS", 20)
    tokens: list[tuple[int, int]] = []
    rows = RowMaker.rows

    def watched(self: Any, examples: Any) -> Any:
        if self.selftest is None:  # the self-test's own rows
            return rows(self, examples)
        tokens.append((len(examples), len(examples) * max(e.length for e in examples)))
        return rows(self, examples)

    monkeypatch.setattr(RowMaker, "rows", watched)
    workers.analyzer().compute_pefs(workers.examples(12), batch_size="auto")
    assert sum(n for n, _ in tokens) == 12
    assert all(n == 1 or size <= 20 for n, size in tokens)


@pytest.mark.parametrize(("n", "d"), [(300, 64), (40, 200)])
@pytest.mark.parametrize("balance", ["none", "module"])
def test_a_fit_out_of_core_ends_where_a_fit_in_memory_ends(n: int, d: int, balance: Any, tmp_path: Path) -> None:
    """Oracle: the relative loss of the fit that holds all rows (in Gram space for n = 40), to 1e-6."""
    A, _, _ = planted.planted(n, 3, d, 6, overlap=0.1, noise=0.3, active=2, seed=0)
    PEFs.concatenate([PEFs.from_factors(part) for part in A.split(n // 3)]).save(tmp_path / "pefs")
    pefs = PEFs.load(tmp_path / "pefs")
    if balance == "module":
        pefs.info["sketch"] = {"kind": "identity", "dim": None, "seed": 0,
                               "shapes": [["a", [d // 4, 1]], ["b", [d - d // 4, 1]]]}  # fmt: skip
        pefs.info["fingerprint"] = pefs_fingerprint(pefs)
    settings: dict[str, Any] = {"n_restarts": 1, "balance": balance, "tolerance": 1e-7}
    whole = NPEFF(6, **settings).fit(pefs)
    parts = NPEFF(6, memory_budget=20 * 3 * d * 4, **settings).fit(
        PEFs.load(tmp_path / "pefs") if balance == "none" else pefs
    )
    assert abs(whole.loss_history[-1] - parts.loss_history[-1]) <= 1e-6
    torch.testing.assert_close(whole.coefficients, parts.coefficients, rtol=0, atol=1e-3)


def pefs_fingerprint(pefs: PEFs) -> str:
    from hf_npeff.pefs.sketches import Sketch

    return Sketch.from_dict(pefs.info["sketch"]).fingerprint


def test_picking_examples_reads_only_their_shards(tmp_path: Path) -> None:
    """Oracle: the same examples of PEFs held in memory; nothing is joined on the way."""
    A = torch.randn(30, 2, 5, generator=torch.Generator().manual_seed(0))
    whole = PEFs.from_factors(A)
    shards = PEFs.concatenate([whole[:10], whole[10:13], whole[13:]])
    for which in ([29, 0, 12, 12, -1], slice(5, 25), slice(None, None, 7), slice(4, 4)):
        assert torch.equal(shards[which].factors, whole[which].factors)
        assert shards[which].example_ids == whole[which].example_ids
    assert not shards._shards.joined
