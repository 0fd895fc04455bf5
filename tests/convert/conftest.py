"""A small checkpoint to quantize."""

from pathlib import Path

import pytest

from hybrid.checkpoint.tiny import make_tiny
from tests.checkpoint.packs import resharded


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several shards; read only."""
    directory = tmp_path_factory.mktemp("models")
    model = make_tiny(directory / "tiny", config={"moe_intermediate_size": 128})
    return resharded(model, directory / "source", 400_000)
