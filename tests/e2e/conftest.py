from pathlib import Path

import pytest

from tests.helpers.launch import tiny_config, train


@pytest.fixture(scope="session")
def finished(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run on the tiny set, and what it said."""
    folder = tmp_path_factory.mktemp("finished")
    said = train(tiny_config(folder), f"data.root={tiny_shards}", f"run.root={folder}")
    return folder / "tiny", said
