"""Tables of embeddings: any Parquet reader supports them, and reading them returns what was written."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distav.config.errors import UserError
from distav.evaluation.embedding import COLUMNS, Embeddings, to_table


@pytest.mark.parametrize("has_audio", [[True, False, True], [False, False, False]], ids=["one missing", "all missing"])
def test_embeddings_of_missing_modalities_are_null_and_keep_their_width(has_audio: list[bool], tmp_path: Path):
    rng, none = np.random.default_rng(0), np.zeros((3, 0), np.float32)
    audio_exists = np.array(has_audio)
    arrays = [rng.normal(size=(3, width)).astype(np.float32) for width in (4, 6, 2, 2)]
    for values in (arrays[1], arrays[3]):
        values[~audio_exists] = 0
    written = Embeddings(*arrays, none, none, none, np.ones(3, dtype=bool), audio_exists)
    pq.write_table(to_table(written, {"key": list("abc")}), tmp_path / "table.parquet")
    table = pq.read_table(tmp_path / "table.parquet")
    # Lists of a fixed size with null values cannot be written or read by older versions of Arrow.
    assert all(table.schema.field(name).type == pa.list_(pa.float32()) for name in COLUMNS)
    assert [row is not None for row in table.column("audio").to_pylist()] == has_audio
    read = Embeddings.from_table(table)
    for name in COLUMNS:
        assert np.array_equal(getattr(read, name), getattr(written, name))
    assert np.array_equal(read.has_audio, audio_exists) and read.has_visual.all()


def test_a_table_that_does_not_state_the_widths_is_rejected():
    table = pa.table({name: [[1.0, 2.0]] for name in COLUMNS})
    with pytest.raises(UserError, match="do not state their width; run tools/embed.py again"):
        Embeddings.from_table(table)
