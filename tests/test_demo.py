"""The demo's own parts; tests/test_real_model.py runs its model."""

from __future__ import annotations

import pytest

from hf_npeff import demo

gguf = pytest.importorskip("gguf", reason="the demo's packaged model is a GGUF file")


def test_a_gguf_file_is_read_once_and_the_reader_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a count of calls, inside and, after an error, outside again."""
    calls: list[object] = []
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, lambda *given: calls.append(given) or given)
    with pytest.raises(RuntimeError), demo._gguf_read_once():
        assert all(gguf.GGUFReader("a.gguf") == ("a.gguf",) for _ in range(3))
        assert all(gguf.get_tensor_name_map(1, blocks) == (1, blocks) for blocks in (30, 30, 31))
        raise RuntimeError
    assert calls == [("a.gguf",), (1, 30), (1, 31)]
    gguf.GGUFReader("a.gguf")
    gguf.GGUFReader("a.gguf")
    assert len(calls) == 5
