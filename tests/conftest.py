"""Shared fixtures. `tiny` is a random checkpoint in the released format, made once per test run."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from hybrid.checkpoint.tiny import make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a small random INT4 checkpoint; read only."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny")


# The first example of a property may compile kernels: no per-example deadline.
settings.register_profile("kimi-local", deadline=None)
settings.register_profile("forced-isa", deadline=None, max_examples=20)  # four times over
settings.load_profile("forced-isa" if "KIMI_LOCAL_EXPECT_ISA" in os.environ else "kimi-local")
