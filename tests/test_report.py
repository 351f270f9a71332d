"""The page's data against dense oracles, and everything about it that needs no browser."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import math
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_npeff import (
    Decomposition,
    DecompositionConfig,
    FisherConfig,
    NPEFFAnalyzer,
    ParameterDirection,
    PEFs,
    PerturbationReport,
)
from hf_npeff.cli import app
from hf_npeff.decomposition.estimator import NPEFF
from hf_npeff.encoding.columns import CORRECT, as_column, columns_of, correctness
from hf_npeff.errors import CorruptStoreError, FormatVersionError
from hf_npeff.report import examples, notebook, plots
from hf_npeff.report.data import Extras
from hf_npeff.report.modules import by_layer, estimated_energies, place_of
from hf_npeff.report.pack import pack, quantised
from hf_npeff.report.page import write, write_space
from hf_npeff.report.training import history_file, read_run
from hf_npeff.weights.perturbation import Effect
from hf_npeff.weights.token_alignments import TokenAlignment
from tests import reference, warm_processes
from tests.analyses import analyzer_of
from tests.hub_server import HubServer
from tests.planted import planted
from tests.random_decomposition import random_decomposition
from tests.tiny import WORDS, tiny_batch, tiny_model, tiny_tokenizer

EVIL = [
    "</script><script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 1"> & \'quotes\' "double"',
    "שלום עולם \u202egnp.exe",
    "🧭👩🏽‍🚀 \ud800 lone",
    "nul \x00 bell \x07 tab\tnew\nline\r\nreturn \u2028 separator",
    "<!-- comment --> ]]> ${template} `tick` $title",
    "long " * 20_000,
]


def unpack(packed: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `pack` was given, by its description alone: the facts, and the arrays."""
    whole = gzip.decompress(base64.b64decode(packed))
    length = int.from_bytes(whole[:4], "little")
    facts = json.loads(whole[4 : 4 + length])
    arrays = {}
    for name, described in facts.pop("arrays").items():
        kind, count = np.dtype(described["type"]).newbyteorder("<"), math.prod(described["shape"])
        arrays[name] = np.frombuffer(whole, kind, count, 4 + length + described["at"]).reshape(described["shape"])
    return facts, arrays


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a written page carries."""
    found = re.search(r'<script id="data"[^>]*>([^<]*)</script>', path.read_text(encoding="utf-8"))
    assert found is not None
    return unpack(found[1])


@pytest.fixture(scope="module")
def fitted() -> tuple[PEFs, Decomposition]:
    """Planted PEFs with a label and texts, and what was found in them."""
    factors, _, weights = planted(60, 3, 24, 5, overlap=0.2, noise=0.4, active=2, seed=0)
    texts = [EVIL[i % len(EVIL)] + f" {i}" for i in range(60)]
    labels = weights.argmax(1).tolist()
    pefs = PEFs.from_factors(factors, text=texts, label=labels, prediction=[str(label) for label in labels])
    return pefs, NPEFF(5, n_restarts=2, seed=0, progress=False).fit(pefs)


# What the page says of examples


def test_the_explained_fraction_is_one_less_the_dense_residual(fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: ‖F_i − Σ_j W_ij g_j g_jᵀ‖² of dense matrices, example by example; their mean is the decomposition's."""
    pefs, found = fitted
    told = examples.explained_by(found.coefficients, found.pseudo_fishers, k=5)
    for i in range(len(pefs)):
        A = pefs.factors[i : i + 1].double()
        loss = reference.loss(A, found.coefficients[i : i + 1].double(), found.pseudo_fishers.double())
        assert told.total[i] == pytest.approx(1 - loss / reference.total(A), abs=1e-5)
    assert told.total.mean() == pytest.approx(found.explained, abs=1e-5)


def test_parts_are_what_components_have_in_common_with_the_example(fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: W_ij ⟨F_i, g_j g_jᵀ⟩ of dense matrices; they sum to the explained fraction, the largest come first."""
    pefs, found = fitted
    told = examples.explained_by(found.coefficients, found.pseudo_fishers, k=5)
    for i in (0, 7, 31):
        F = pefs.gram(i).double()
        G = found.pseudo_fishers.double()
        truth = (found.coefficients[i].double() * torch.einsum("jd,de,je->j", G, F, G)).tolist()
        got = dict(zip(told.components[i].tolist(), told.parts[i].tolist(), strict=True))
        assert got == pytest.approx(dict(enumerate(truth)), abs=1e-5)
        assert sum(got.values()) == pytest.approx(told.total[i])
        assert np.all(np.diff(told.parts[i]) <= 0)


def test_neighbours_are_the_largest_cosines() -> None:
    """Oracle: all cosines, sorted here."""
    G = torch.nn.functional.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(1)), dim=1)
    near, cosines = examples.nearest_components(G, 3)
    C = (G.double() @ G.double().T).numpy()
    for j in range(7):
        order = sorted((l for l in range(7) if l != j), key=lambda l: -abs(C[j, l]))[:3]
        assert near[j].tolist() == order
        assert cosines[j] == pytest.approx([C[j, l] for l in order])


def test_the_map_keeps_planted_groups_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: planted truth. 90% of the nearest on the map are of the same group, with and without landmarks."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(240) % 4
    W = torch.rand(240, 8, generator=generator) * 0.05
    W[torch.arange(240), group] += 1
    W[torch.arange(240), 4 + group] += 0.5 * torch.rand(240, generator=generator)

    def agreement(xy: np.ndarray) -> float:
        distances = ((xy[:, None] - xy[None]) ** 2).sum(-1)
        np.fill_diagonal(distances, np.inf)
        return float((group.numpy()[distances.argmin(1)] == group.numpy()).mean())

    for method in ("tsne", "pca"):
        xy = examples.place(W, method)
        assert xy.shape == (240, 2) and xy.min() == 0 and xy.max() == 1
        assert np.array_equal(xy, examples.place(W, method))
        assert agreement(xy) > 0.9
    monkeypatch.setattr(examples, "LANDMARKS", 80)
    xy = examples.place(W)
    assert np.isfinite(xy).all() and agreement(xy) > 0.9
    for few in (
        W[:0],
        W[:1],
        W[:3],
        torch.zeros(30, 3),
        torch.ones(30, 3),
        torch.eye(30)[:, :1],
        torch.eye(2)[group % 2],
    ):
        xy = examples.place(few)
        assert xy.shape == (len(few), 2) and np.isfinite(xy).all()
    with pytest.raises(ValueError, match="umap"):
        examples.place(W, "umap")  # type: ignore[arg-type]


# Columns


@pytest.mark.parametrize(
    ("values", "kind", "shown"),
    [
        (["a", "b", "a", "a"], "category", ["a", "b"]),
        ([10, 9, 10, 9, None], "category", ["9", "10", None]),
        ([True, False, True], "category", ["True", "False"]),
        ([0.5 * i for i in range(40)], "number", []),
        ([1, "1", True, None, 2.5, "x", [1]] * 3, "category", None),
        ([f"text number {i}" for i in range(40)], "text", None),
        (["x" * 200, "y" * 200] * 20, "text", None),
        ([None] * 5, "category", [None]),
        ([math.nan] * 20 + [float(i) for i in range(20)], "number", []),
    ],
)
def test_columns_are_told_by_what_they_hold(values: list[Any], kind: str, shown: list[Any] | None) -> None:
    """Oracle: planted truth; codes point back to the values."""
    column = as_column("c", values)
    assert column.kind == kind
    if shown is not None:
        assert column.values == shown
    if kind == "category":
        assert column.data is not None
        back = [column.values[code] for code in column.data]
        assert [b is None for b in back] == [v is None for v in values]
        assert all(b == str(v) for b, v in zip(back, values, strict=True) if isinstance(v, str | int))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"label": [0, 1, 1], "prediction": ["LABEL_0", "LABEL_0", "LABEL_1"]}, ["right", "wrong", "right"]),
        ({"label": [0, 1, None], "prediction": ["0", "0", "1"]}, ["right", "wrong", None]),
        ({"label": [0, 1], "prediction": ["no", "no"]}, ["right", "wrong"]),
        (
            {"answer": ["Florida", "Minnesota", "Ohio"], "prediction": [" Florida", " Min", " Utah"]},
            ["right", "right", "wrong"],
        ),
        ({"label": ["a", "b"], "prediction": ["x", "y"]}, None),
        ({"label": ["a", "b"]}, None),
        ({"prediction": ["a", "b"]}, None),
    ],
)
def test_right_and_wrong(columns: dict[str, list[Any]], expected: list[Any] | None) -> None:
    """Oracle: planted truth; nothing is said where prediction and label have nothing in common."""
    column = correctness(columns, {"0": "no", "1": "yes"})
    if expected is None:
        assert column is None
    else:
        assert column is not None and column.data is not None
        assert [column.values[code] for code in column.data] == expected
        assert CORRECT in [c.name for c in columns_of(columns, {"0": "no", "1": "yes"})]


# Modules


def test_energies_by_layer_and_kind() -> None:
    """Oracle: planted truth, counted by hand."""
    direction = {
        "model.layers.0.mlp.up.weight": torch.tensor([[3.0, 0.0]]),
        "model.layers.10.mlp.up.weight": torch.tensor([[0.0, 4.0]]),
        "lm_head.weight": torch.tensor([[12.0]]),
    }
    energies = ParameterDirection(direction, dict.fromkeys(direction, "linear")).energies()
    assert energies == pytest.approx({k: v / 169 for k, v in zip(direction, (9, 16, 144), strict=True)})
    table = by_layer({1: energies}, 3, [1], order=list(direction))
    assert table.layers == ["0", "10", "other"] and table.kinds == ["mlp.up", "lm_head"]
    assert np.isnan(table.shares[0]).all() and np.isnan(table.shares[1, 0, 1])
    assert table.shares[1, :, 0][:2].tolist() == pytest.approx([9 / 169, 16 / 169])
    assert place_of("encoder.block.1.layer.0.SelfAttention.q.weight") == ("encoder.block.1", "layer.0.SelfAttention.q")
    both = by_layer({0: {"encoder.block.0.q.weight": 0.5, "decoder.block.0.q.weight": 0.5}}, 1)
    assert both.layers == ["encoder.block.0", "decoder.block.0"]


def test_without_a_sketch_the_estimate_is_the_lifted_directions() -> None:
    """Oracle: the directions, whose energies are exact; with the identity as sketch the blocks of g hold the same."""
    model = tiny_model("gpt2")
    data = tiny_batch(model, 10, seed=0)
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=2, sketch="identity"))
    pefs = analyzer.compute_pefs(data)
    for balance in ("none", "module"):
        found = analyzer.decompose(
            pefs, 2, n_restarts=1, max_iterations=2000, tolerance=1e-9, balance=balance, progress=False
        )
        estimated = estimated_energies(found)
        assert estimated is not None
        for j, direction in enumerate(analyzer.lift(found, [0, 1], pefs, data, selective=False)):
            assert estimated[j] == pytest.approx(direction.energies(), abs=2e-3)
    found.info["sketch"] = None
    assert estimated_energies(found) is None


# Packing


def test_packing_keeps_every_string_and_array() -> None:
    """Oracle: identity, lone surrogates and NUL included; NaN and infinities become null; the same bytes again."""
    facts = {"texts": EVIL, "numbers": [1.5, math.nan, math.inf, 2**60], 3: {"nested": [None, True]}}
    arrays = {
        "a": np.arange(12, dtype=np.uint16).reshape(3, 4),
        "b": np.array([1.5, np.nan], dtype=np.float32),
        "c": np.zeros((0, 2), np.uint8),
    }
    packed = pack(facts, arrays)
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", packed)
    told, back = unpack(packed)
    assert told == {"texts": EVIL, "numbers": [1.5, None, None, 2**60], "3": {"nested": [None, True]}}
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and np.array_equal(back[name], array, equal_nan=array.dtype.kind == "f")
    assert pack(facts, arrays) == packed
    with pytest.raises(TypeError, match="float64"):
        pack({}, {"x": np.zeros(2)})


def test_sixteen_bits_are_as_exact_as_they_say() -> None:
    """Oracle: the bound, half a step of the largest."""
    values = np.random.default_rng(0).random((6, 50)) * 10.0 ** np.arange(-3, 3)[:, None]
    codes, largest = quantised(values, axis=1)
    assert codes.dtype == np.uint16
    assert (np.abs(codes * (largest[:, None] / 65535) - values) <= largest[:, None] / 131_000).all()
    assert quantised(np.zeros((2, 3)), axis=1)[0].max() == 0


# The page


def test_a_page_is_one_file_that_may_ask_for_nothing(tmp_path: Path, fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: the HTML itself: the policy's hashes are those of its script and style, and no address is in a tag."""
    path = write(fitted[1], tmp_path / "page.html", layout=None)
    page = path.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None and policy[1].startswith("default-src 'none';")
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        content = re.findall(rf"<{tag}(?: type=\"module\")?>(.*?)</{tag}>", page, re.DOTALL)
        assert len(content) == 1
        digest = base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy[1]
    assert page.count("<script") == 2 and page.count("</script") == 2
    tags = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.DOTALL)
    assert not re.search(r"(?:src|href|action)=\"(?!#/|data:,)", tags)
    assert "http" not in tags.replace("http-equiv", "")
    assert "unsafe" not in policy[1] and "connect-src" not in policy[1]


def test_texts_arrive_as_they_were(tmp_path: Path, fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: identity of every text; none of them stands in the HTML itself."""
    _, found = fitted
    path = write(found, tmp_path / "page.html", layout=None, title=EVIL[0] + EVIL[4])
    facts, arrays = read(path)
    assert facts["text"] == found.columns["text"]
    page = path.read_text(encoding="utf-8")
    assert "hacked" not in page.replace(page[page.index("<title>") : page.index("</title>")], "").replace(
        page[page.index('id="brand">') : page.index("</span></a>")], ""
    )
    assert "&lt;/script&gt;" in page and "\x00" not in page
    assert facts["n"] == 60 and facts["r"] == 5 and facts["key"] == found.key
    W = arrays["W"] * (arrays["W_largest"][:, None] / 65535.0)
    assert np.abs(W.T - found.coefficients.numpy()).max() <= arrays["W_largest"].max() * (0.5 / 65535 + 1e-7)
    shares = found.coefficients / found.coefficients.sum(1, keepdim=True).clamp_min(1e-30)
    assert np.unpackbits(arrays["active"], axis=1)[:, :60].T.tolist() == (shares > 0.05).int().tolist()


def test_the_same_decomposition_gives_the_same_bytes(tmp_path: Path, fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: identity, the map included."""
    first = write(fitted[1], tmp_path / "a.html").read_bytes()
    assert write(fitted[1], tmp_path / "b.html").read_bytes() == first


def test_private_texts_stay_out(tmp_path: Path, fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: no text, token or text of a report anywhere in the data; ids, labels and predictions are there."""
    _, found = fitted
    changed = [{"index": 1, "id": "1", "text": "hacked", "top": True, "before": "a", "after": "b"}]
    effect = {
        "scale": 1.0,
        "top": 1.0,
        "others": 0.1,
        "ratio": 10.0,
        "top_flips": 0.5,
        "other_flips": 0.0,
        "interval": [8, 12],
    }
    worst = [{"index": 0, "id": "1", "text": "hacked", "kl": 0.2, "before": "a", "after": "b"}]
    groups = {"all": {"n": 1, "kl": 0.1, "worst": worst}, "column=hacked": {"n": 1, "kl": 0.1, "worst": worst}}
    step = {"scale": 1.0, "rank": None, "random": False, "groups": groups}
    end = {**worst[0], "input_ids": [1], "replaced": 1, "kl_start": 0.1, "own": False}
    report = {"best": effect, "opposite": None, "random": effect, "changed": changed, "target": 0.5, "reached": True,
              "other_examples": [1], "held_out": {"n": 1, "steps": [step]},
              "off_target": {"tried": 4, "worst": worst, "searched": [end]}}  # fmt: skip
    extras = Extras(
        alignments=[TokenAlignment(0, 3, 1.0, ["hacked", "x"], [0.5, 0.5], 0.0)], reports={0: report}, compare=found
    )
    facts, _ = read(write(found, tmp_path / "with.html", extras=extras, layout=None))
    assert "hacked" in json.dumps(facts) and facts["shading"]["0"][0]["tokens"] == ["hacked", "x"]
    facts, _ = read(write(found, tmp_path / "without.html", extras=extras, layout=None, texts=False))
    assert "hacked" not in json.dumps(facts) and facts["text"] is None and facts["shading"] == {}
    assert {c["name"] for c in facts["columns"]} == {"label", "prediction", CORRECT}
    assert any("private" in note for note in facts["notes"])


def test_little_is_enough(tmp_path: Path) -> None:
    """Oracle: identity. Rows made elsewhere, no column, one component, no evaluation, dead components, zero PEFs."""
    config = DecompositionConfig(n_components=1)
    info = {"fingerprint": "rows", "fisher": FisherConfig().to_dict(), "sketch": None, "model": None}
    for n in (1, 5):
        bare = Decomposition(
            torch.zeros(n, 1), torch.ones(1, 1), config=config, info=info, example_ids=[str(i) for i in range(n)]
        )
        facts, arrays = read(write(bare, tmp_path / f"{n}.html"))
        assert facts["text"] is None and facts["components"][0]["stability"] is None and facts["explained"] is None
        assert "near" not in arrays and arrays["explained"].tolist() == [0.0] * n
        assert any("text" in note for note in facts["notes"])


def test_extras_that_do_not_fit_are_refused(tmp_path: Path, fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: the message names what and which; nothing is written."""
    _, found = fitted
    path = tmp_path / "page.html"
    elsewhere = random_decomposition(4, 2)
    elsewhere.example_ids = ["a", "b", "c", "d"]
    for extras, words in (
        (Extras(alignments=[TokenAlignment(9, 0, 1.0, None, [1.0], 0.0)]), "alignments.*9"),
        (Extras(energies={-1: {"w": 1.0}}), "energies.*-1"),
        (Extras(adapters={5: "x"}), "adapters.*5"),
        (Extras(reports={7: {}}), "reports.*7"),
        (Extras(reports={0: {"changed": [{"index": 1, "id": "elsewhere"}]}}), "elsewhere.*1"),
        (Extras(compare=elsewhere), "examples.*sketch"),
    ):
        with pytest.raises(ValueError, match=words):
            write(found, path, extras=extras, layout=None)
    assert not path.exists()


def test_a_path_that_is_taken_is_left_alone(tmp_path: Path, fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: bytes before and after; folders are refused, missing ones made, force writes over."""
    path = tmp_path / "new" / "page.html"
    write(fitted[1], path, layout=None)
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="--force"):
        write(fitted[1], path, layout=None)
    assert path.read_text() == "mine"
    write(fitted[1], path, layout=None, force=True)
    assert path.read_text().startswith("<!doctype html>")
    with pytest.raises(IsADirectoryError, match=r"index\.html"):
        write(fitted[1], tmp_path, force=True)


@pytest.mark.parametrize("missing", ["sklearn", "plotly"])
def test_a_missing_extra_is_named(
    tmp_path: Path, fitted: tuple[PEFs, Decomposition], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the message says what to install; without a map the page needs neither."""
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "sklearn":
        with pytest.raises(ModuleNotFoundError, match=r"hf-npeff\[viz\].*layout='pca'.*layout=None"):
            write(fitted[1], tmp_path / "page.html")
        assert not (tmp_path / "page.html").exists()
        assert "xy" in read(write(fitted[1], tmp_path / "pca.html", layout="pca"))[1]
    else:
        with pytest.raises(ModuleNotFoundError, match=r"hf-npeff\[viz\]"):
            plots.overview(fitted[1])
    facts, arrays = read(write(fitted[1], tmp_path / "page.html", layout=None))
    assert "xy" not in arrays and any("map" in note for note in facts["notes"])


def test_to_html_writes_the_page(tmp_path: Path, fitted: tuple[PEFs, Decomposition]) -> None:
    """Identity with the report's own function, options included."""
    page = fitted[1].to_html(tmp_path / "page.html", layout=None, texts=False, title="A <title>")
    other = write(fitted[1], tmp_path / "other.html", layout=None, texts=False, title="A <title>")
    assert page == tmp_path / "page.html" and page.read_bytes() == other.read_bytes()


def test_a_page_is_small(tmp_path: Path) -> None:
    """Oracle: a bound for 2,000 examples × 64 dense components: 16 bits each in base64, and 210 bytes a text."""
    path = write(random_decomposition(2000, 64), tmp_path / "page.html", layout="pca")
    assert path.stat().st_size < 1.1 * (2000 * 64 * 2 + 2000 * 210) * 4 / 3 + 120_000


def test_shading_arrives_and_sums_to_the_alignment(tmp_path: Path) -> None:
    """Oracle: identity. What a page carries of a real pass sums to ‖A_i g_j‖² to 6 digits."""
    model = tiny_model("llama")
    data = tiny_batch(model, 8, seed=0)
    analyzer = NPEFFAnalyzer(model, fisher=FisherConfig(rank=2, sketch="kronecker", sketch_dim=4))
    pefs = analyzer.compute_pefs(data)
    found = analyzer.decompose(pefs, 2, n_restarts=1, max_iterations=20, progress=False)
    alignments = analyzer.token_alignments(found, pefs, data, n_top=3)
    facts, arrays = read(write(found, tmp_path / "page.html", extras=Extras(alignments=alignments), layout=None))
    N = torch.einsum("icd,jd->icj", pefs.factors, found.pseudo_fishers).square().sum(1)
    seen = 0
    for j, shadings in facts["shading"].items():
        for one in shadings:
            truth = float(N[one["example"], int(j)])
            assert one["alignment"] == pytest.approx(truth, rel=1e-4)
            assert sum(one["contributions"]) + one["unplaced"] == pytest.approx(truth, rel=1e-4)
            assert len(one["tokens"]) == len(one["contributions"]) == len(data[one["example"]]["input_ids"])
            seen += 1
    assert seen == len(alignments) > 3
    assert facts["modules"]["exact"] == [] and arrays["energy"].shape[0] == 2


# Training runs


def test_a_run_is_what_the_callback_writes(tmp_path: Path, fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: the callback's own names of files, and the measures of a point as it takes them."""
    from hf_npeff import callback
    from hf_npeff.decomposition.drift import drift

    _, found = fitted
    place = tmp_path / "checkpoint-3" / callback.FOLDER
    place.mkdir(parents=True)
    points = [
        {"step": 2, "epoch": 1.0, **drift(found, None, False)},
        {"step": 3, "epoch": 1.5, **drift(found, found, False)},
    ]
    (place / callback.HISTORY).write_text("".join(json.dumps(point) + "\n" for point in points))
    facts, arrays = read(write(found, tmp_path / "page.html", extras=Extras(training=tmp_path), layout=None))
    assert (
        facts["training"]["steps"] == [2, 3] and facts["training"]["explained"] == [pytest.approx(found.explained)] * 2
    )
    assert arrays["training/share"].sum(1) == pytest.approx([1, 1])
    assert np.isnan(arrays["training/cosine"][0]).all() and arrays["training/cosine"][1] == pytest.approx(1)


def test_a_run_is_read_from_its_latest_checkpoint(tmp_path: Path) -> None:
    """Oracle: planted files; 10 comes after 9 though not in the alphabet."""

    def point(step: int) -> dict[str, Any]:
        return {
            "step": step,
            "epoch": step / 5,
            "explained": 0.1 * step,
            "active": 2,
            "share": [0.75, 0.25],
            "cosine": None,
            "correlation": [0.5, None],
        }

    for last in (9, 10):
        folder = tmp_path / f"checkpoint-{last}" / "npeff"
        folder.mkdir(parents=True)
        lines = [json.dumps(point(step)) + "\n" for step in range(8, last + 1)]
        (folder / "history.jsonl").write_text("".join(lines))
    run = read_run(tmp_path, 2)
    assert run.steps == [8, 9, 10] and run.share.shape == (3, 2) and run.share[0].tolist() == [0.75, 0.25]
    assert np.isnan(run.cosine).all() and run.correlation[1, 0] == 0.5 and np.isnan(run.correlation[1, 1])
    for folder in (tmp_path / "checkpoint-9", tmp_path / "checkpoint-9" / "npeff"):
        assert read_run(folder, 2).steps == [8, 9]
    with pytest.raises(ValueError, match=r"history\.jsonl.*3"):
        read_run(tmp_path, 3)
    with pytest.raises(FileNotFoundError, match="checkpoint-N"):
        history_file(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-10" / "npeff" / "history.jsonl").write_text("{oops\n")
    with pytest.raises(CorruptStoreError, match=r"history\.jsonl"):
        read_run(tmp_path, 2)


# Figures and notebooks


def test_figures_show_what_they_say(fitted: tuple[PEFs, Decomposition], tmp_path: Path) -> None:
    """Oracle: the numbers of the decomposition, counted here."""
    go = pytest.importorskip("plotly.graph_objects", reason="plotly is in the extra viz")
    _, found = fitted
    figure = plots.example(found, 3)
    shares = [trace.x[0] for trace in figure.data]
    assert sum(shares) == pytest.approx(1, abs=1e-5) and "explained" in figure.layout.title.text
    assert list(plots.overview(found).data[0].y) == [c.active_share for c in found]
    assert len(plots.coefficients(found[1]).data[0].x) == int((found[1].coefficients > 0).sum())
    bars = plots.by_column(found[1], "label").data
    active = found[1].coefficients > 0.05 * found.coefficients.sum(1)
    labels = [label for label, on in zip(found.columns["label"], active.tolist(), strict=True) if on]
    assert dict(zip(bars[0].x, bars[0].y, strict=True)) == pytest.approx(
        {str(v): labels.count(v) / len(labels) for v in set(labels)}
    )
    assert len(plots.example_map(found, "label", layout="pca").data) == len(set(found.columns["label"]))
    assert len(plots.example_map(found, 2, layout="pca").data[0].x) == 60
    assert np.diag(plots.comparison(found, found).data[0].z) == pytest.approx(1, abs=1e-6)
    assert plots.modules(found, 0, {0: {"h.1.mlp.weight": 1.0}}).data[0].z.tolist() == [[1.0]]
    assert isinstance(plots.neighbours(found), go.Figure)
    one = TokenAlignment(0, 3, 1.0, ["a", "b"], [1.5, -0.5], 0.0)
    assert list(plots.tokens([one]).data[0].y) == [1.5, -0.5]
    folder = tmp_path / "npeff"
    folder.mkdir()
    (folder / "history.jsonl").write_text('{"step": 4, "share": [0.5, 0.5]}\n')
    assert plots.training(tmp_path, 2).data[0].z.tolist() == [[0.5], [0.5]]
    for wrong in (lambda: plots.by_column(found[0], "text"), lambda: plots.modules(found, 0), lambda: plots.tokens([])):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(IndexError, match="60"):
        plots.example(found, 60)


def test_notebooks_show_texts_and_no_markup(fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: tags of the HTML: only the table's own."""
    _, found = fitted
    found.rename(0, "<b>bold</b>")
    try:
        for shown in (notebook.of_decomposition(found), notebook.of_component(found[0])):
            assert set(re.findall(r"</?(\w+)", shown)) <= {"div", "p", "b", "table", "thead", "tbody", "tr", "th", "td"}
            assert "<b>bold" not in shown and "<script" not in shown and "&lt;b&gt;bold" in shown
        assert found._repr_html_() == notebook.of_decomposition(found)
        assert found[0]._repr_html_() == notebook.of_component(found[0])
        effect = Effect(0.3, 0.5, 0.04, 12.0, (9.0, 15.0), (0.1, 0.5, 0.9), (0.0, 0.0, 0.1), 0.5, 0.1)
        changed = [{"index": 1, "id": "1", "text": EVIL[0], "top": True, "before": "<i>", "after": "b"}]
        report = PerturbationReport(0, 0.5, effect, None, effect, [1], [2], changed, True)
        assert notebook.effect_rows(report)[0] == ("this step", "0.3", "0.5", "0.04", "12", "50%", "10%")
        assert "answers changed 50% and 10%" in repr(effect) and "answers changed 50% and 10%" in repr(report)
        assert "&lt;i&gt;" in report._repr_html_() and "<script" not in report._repr_html_()
        assert report._repr_html_().count("<tr>") == 3 + 2  # two steps and one answer, each table with its header
        if find_spec("plotly") is not None:
            assert [list(bar.y) for bar in plots.perturbation(report).data] == [[0.5, 0.5], [0.04, 0.04]]
    finally:
        found.rename(0, None)


def test_notebooks_show_an_analyzer_its_pefs_an_adapter_and_settings() -> None:
    """Oracle: the objects' own numbers; tags of the HTML: only the table's own."""
    analyzer = analyzer_of(tiny_model("bert"), tiny_tokenizer(), sketch="identity", target_modules=[r"query"])
    data = [{"text": text, "label": i % 2} for i, text in enumerate(["<b>cat</b> sees", "a dog", "one two", "a cat"])]
    pefs = analyzer.compute_pefs(data)
    direction = analyzer.direction_of({name: torch.ones(shape) for name, shape in analyzer.shapes.items()}, {})
    shown = {
        name: each._repr_html_()
        for name, each in (
            ("analyzer", analyzer), ("pefs", pefs), ("adapter", direction.to_adapter(1)),
            ("shira", direction.to_adapter(1, kind="shira")), ("config", pefs.config),
        )
    }  # fmt: skip
    for page in shown.values():
        assert set(re.findall(r"</?(\w+)", page)) <= {"div", "p", "b", "table", "thead", "tbody", "tr", "th", "td"}
        assert "<b>cat" not in page
    numbers = sum(out * wide for out, wide in analyzer.shapes.values())
    assert f"{numbers:,} in {len(analyzer.shapes)} parameters" in shown["analyzer"]
    assert "&lt;b&gt;cat" in shown["pefs"] and "label" in shown["pefs"] and f"{pefs.sketch_error:.2g}" in shown["pefs"]
    for name in analyzer.shapes:
        assert name in shown["adapter"] and name in shown["shira"]
    assert "100.0%" not in shown["adapter"] and shown["adapter"].count("50.0%") == len(analyzer.shapes) == 2
    settings = {field.name for field in dataclasses.fields(FisherConfig)}
    assert all(f">{name}<" in shown["config"] for name in settings)
    assert repr(pefs.config.sketch).replace("'", "&#x27;") in shown["config"]


# A Space


def test_a_space_is_a_page_and_a_card(tmp_path: Path, fitted: tuple[PEFs, Decomposition]) -> None:
    """Oracle: what the loopback Hub holds after the push: the page, bit for bit, and a card that says static."""
    page = write(fitted[1], tmp_path / "page.html", layout=None)
    write_space(tmp_path / "space", page, fitted[1], title="A: 'title' of\nmine")
    card = (tmp_path / "space" / "README.md").read_text(encoding="utf-8")
    assert "sdk: static" in card and "\ntitle: 'A: ''title'' of mine'" in card
    code = "import sys; from hf_npeff.report.page import push_space; print(push_space(*sys.argv[1:]))"
    command = ["-c", code, tmp_path / "space", "alice/components"]
    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        done = warm_processes.run(command, env=hub.env("hf_alice", home=tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        stored = hub.repos["spaces/alice/components"].files()
    assert "alice/components" in done.stdout
    assert stored["index.html"] == page.read_bytes() and b"sdk: static" in stored["README.md"]


# The command, and the page of the docs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its data, PEFs and components."""
    folder = tmp_path_factory.mktemp("report")
    model = tiny_model("gpt2", "sequence-classification", dtype=torch.float32, id2label={0: "no", 1: "yes", 2: "maybe"})
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    drawn = torch.randint(0, len(WORDS), (20, 6), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"id": f"e{i}", "text": " ".join(WORDS[j] for j in row), "label": i % 3} for i, row in enumerate(drawn)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    analyzer = NPEFFAnalyzer.from_pretrained(
        folder / "model", fisher=FisherConfig(rank=2, sketch="kronecker", sketch_dim=4)
    )
    pefs = analyzer.compute_pefs(rows, folder / "pefs")
    analyzer.decompose(pefs, 3, n_restarts=2, max_iterations=200, progress=False).save_pretrained(folder / "found")
    return folder


def told(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_command_writes_a_page_and_does_not_write_over_it(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the page's data against the decomposition; bytes before and after a refusal."""
    monkeypatch.chdir(world)
    values = told("report", "found")
    page = world / "found" / "report.html"
    assert Path(values["page"]) == Path("found/report.html") and values["bytes"] == page.stat().st_size
    facts, arrays = read(page)
    found = Decomposition.load(world / "found")
    assert facts["text"] == found.columns["text"] and facts["key"] == found.key and arrays["xy"].shape == (20, 2)
    names = {0: "no", 1: "yes", 2: "maybe"}
    right = [names[label] == p for label, p in zip(found.columns["label"], found.columns["prediction"], strict=True)]
    assert any(right)
    at, column = next((i, c) for i, c in enumerate(facts["columns"]) if c["name"] == CORRECT)
    assert [column["values"][code] == "right" for code in arrays[f"column/{at}"]] == right
    page.write_text("mine")
    done = CliRunner().invoke(app, ["report", "found"])
    assert done.exit_code == 1 and "--force" in done.stderr and page.read_text() == "mine"
    told("report", "found", "--force", "--map", "none", "--no-texts")
    facts, arrays = read(page)
    assert facts["text"] is None and "xy" not in arrays


def test_a_person_at_a_terminal_is_asked(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the file after a no and after a yes."""
    from hf_npeff.commands import reporting

    page = world / "asked.html"
    page.write_text("mine")
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("sys.stderr", type("Terminal", (), {"isatty": lambda self: True, "write": print})())
    for answer in (False, True):
        monkeypatch.setattr("typer.confirm", lambda question, err, answer=answer: answer)
        if answer:
            assert reporting._may_write(page, None, False) is True
        else:
            with pytest.raises(FileExistsError, match=r"asked\.html"):
                reporting._may_write(page, None, False)
    assert page.read_text() == "mine"


def test_the_command_shades_tokens_and_shows_what_perturb_found(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the analyzer's own alignments, energies of the lifted direction, and the report that perturb wrote."""
    monkeypatch.chdir(world)
    options = ("--component", 1, "-o", "off", "--n-top", 4, "--n-others", 8)
    perturbed = told("perturb", "found", "pefs", "model", "data.jsonl", *options)
    known = ("--pefs", "pefs", "--model", "model", "--data", "data.jsonl", "--modules", "--top", 3)
    told("report", "found", "-o", "page.html", "--perturbation", "off", "--compare", "found", "--map", "none", *known)
    facts, arrays = read(world / "page.html")
    found = Decomposition.load(world / "found")
    for j in range(3):
        top = found[j].top_examples(3)
        wanted = [i for i, w in zip(top.indices, top.coefficients, strict=True) if w > 0]
        assert [one["example"] for one in facts["shading"][str(j)]] == wanted
        for one in facts["shading"][str(j)]:
            assert "".join(one["tokens"]).split() == found.columns["text"][one["example"]].split()
            assert sum(one["contributions"]) + one["unplaced"] == pytest.approx(one["alignment"], rel=1e-3)
    assert facts["reports"]["1"]["best"] == perturbed["best"] and facts["adapters"] == {"1": "off/adapter"}
    assert set(facts["modules"]["exact"]) == {0, 1, 2}
    truth = ParameterDirection.load(world / "off" / "direction").energies()
    assert np.nansum(arrays["energy"][1]) == pytest.approx(1, abs=1e-5) and np.nanmax(
        arrays["energy"][1]
    ) == pytest.approx(max(by_layer({0: truth}, 1).shares[0][~np.isnan(by_layer({0: truth}, 1).shares[0])]), rel=1e-4)
    assert facts["comparison"]["pairs"][0][2] == pytest.approx(1)
    for wrong, message in (
        (("--pefs", "pefs"), "go together"),
        (("--modules",), "go together"),
        (("--perturbation", "model"), "report.json"),
        (("--training", "model"), "checkpoint-N"),
        (("--space", "no/such/name"), "user/name"),
    ):
        done = CliRunner().invoke(app, ["report", "found", "-o", "new.html", *wrong])
        assert done.exit_code in (1, 2) and message in " ".join(done.stderr.split()), done.stderr
        assert not (world / "new.html").exists()


def test_names_of_a_page_reach_the_folder(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the decomposition that is read back; wrong files are refused and change nothing."""
    monkeypatch.chdir(world)
    found = Decomposition.load(world / "found")
    content = {"format_version": 1, "kind": "component names", "decomposition": found.key, "names": {"2": " plurals "}}
    (world / "names.json").write_text(json.dumps(content))
    told("components", "found", "--names", "names.json")
    assert Decomposition.load(world / "found").names == {2: "plurals"}
    for wrong in (
        {**content, "decomposition": "0" * 16},
        {**content, "names": {"3": "x"}},
        {**content, "names": {"-1": "x"}},
        {**content, "names": {"1": 5}},
        {**content, "names": ["x"]},
        {"format_version": 1, "names": {"1": "x"}},
    ):
        (world / "wrong.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"wrong\.json"):
            found.rename(world / "wrong.json")
    for text, error in (("{", CorruptStoreError), ('{"names": {"1": "x"}}', FormatVersionError)):
        (world / "wrong.json").write_text(text)
        with pytest.raises(error, match=r"wrong\.json"):
            found.rename(str(world / "wrong.json"))
    assert found.names == {}


def test_a_published_space_has_no_texts_unless_they_are_asked_for(world: Path, tmp_path: Path) -> None:
    """Oracle: the data of index.html as the loopback Hub holds it; the page beside it has the texts."""
    with HubServer(tokens={"hf_alice": "alice"}) as hub:
        for name, extra in (("public", ()), ("whole", ("--include-texts",))):
            page = f"{name}/page.html"
            command = ["-m", "hf_npeff", "report", "found", "-o", page, "--map", "none"]
            command += ["--space", f"alice/{name}", *extra]
            done = warm_processes.run(command, cwd=world, env=hub.env("hf_alice", home=tmp_path))
            assert done.returncode == 0, done.stderr
            stored = hub.repos[f"spaces/alice/{name}"].files()
            (tmp_path / name).write_bytes(stored["index.html"])
            assert (read(tmp_path / name)[0]["text"] is None) == (name == "public")
            assert read(world / page)[0]["text"] is not None
            assert b"sdk: static" in stored["README.md"]


def test_the_docs_block_runs(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the page that it writes has shading, energies, a report and a comparison."""
    text = (Path(__file__).parent.parent / "docs" / "report.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    found, pefs = Decomposition.load(world / "found"), PEFs.load(world / "pefs")
    four = NPEFF(4, n_restarts=1, max_iterations=200, progress=False).fit(pefs)
    rows = [json.loads(line) for line in (world / "data.jsonl").read_text().splitlines()]
    analyzer = NPEFFAnalyzer.from_pretrained(world / "model", fisher=found.fisher_config)
    monkeypatch.chdir(tmp_path)
    exec(block, {"analyzer": analyzer, "decomposition": four, "pefs": pefs, "dataset": rows, "another": found})
    facts, _ = read(tmp_path / "page.html")
    assert facts["shading"] and facts["modules"]["exact"] == [3] and "3" in facts["reports"] and facts["comparison"]
