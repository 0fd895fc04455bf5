"""The source of the demo model, and the demo model itself, built at most once and shared with other tests."""

import importlib.util
from pathlib import Path

import pytest

from hybrid.demo import demo_path
from hybrid.demo.gguf_source import PACKAGE, GGUFLlama, find_gguf


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip("the demo model's package is not installed: make test installs it")
    return find_gguf()


@pytest.fixture(scope="session")
def source(gguf_path: Path) -> GGUFLlama:
    return GGUFLlama(gguf_path)


@pytest.fixture(scope="session")
def demo(gguf_path: Path) -> Path:
    """Directory of the demo model in this user's cache; read only."""
    return demo_path()
