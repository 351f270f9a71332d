"""Footers of Parquet files: the codecs pyarrow sees, and nothing but ValueError for what is damaged."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_npeff.sharing.parquet_footer import has_known_codecs

TABLE = pa.table({"id": [str(i) for i in range(50)], "label": list(range(50)), "score": [i / 7 for i in range(50)]})


@pytest.mark.parametrize("codec", ["NONE", "SNAPPY", "GZIP", "ZSTD"])
@pytest.mark.parametrize("rows", [5, 1000])
def test_codecs_are_those_that_pyarrow_sees(tmp_path: Path, codec: str, rows: int) -> None:
    """Oracle: pyarrow's own metadata of a sound file, with one row group and with ten."""
    path = tmp_path / "table.parquet"
    pq.write_table(TABLE, path, compression=codec, row_group_size=rows)
    facts = pq.ParquetFile(path).metadata
    seen = {facts.row_group(g).column(c).compression for g in range(facts.num_row_groups) for c in range(3)}
    assert has_known_codecs(path) == (seen <= {"SNAPPY", "UNCOMPRESSED"}) == (codec in ("NONE", "SNAPPY"))


def test_a_damaged_footer_gives_an_answer_or_a_value_error(tmp_path: Path) -> None:
    """Invariant: every truncation and 2,000 drawn changes of the footer's bytes."""
    path = tmp_path / "table.parquet"
    pq.write_table(TABLE, path)
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    start = len(content) - 8 - length
    draw = random.Random(0)
    changed = [content[:cut] for cut in range(0, len(content), 7)]
    for _ in range(2000):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 1, 1, 4))):
            damaged[draw.randrange(start, len(content))] = draw.randrange(256)
        changed.append(bytes(damaged))
    refused = 0
    for damaged_content in changed:
        path.write_bytes(damaged_content)
        try:
            has_known_codecs(path)
        except ValueError:
            refused += 1
    assert refused > len(changed) / 4
