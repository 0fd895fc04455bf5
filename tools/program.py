"""The program as a process of its own, for the tools that watch it from outside."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from numba.core import config as numba_config


def own_cache(directory: Path) -> dict[str, str]:
    """Variables that make `directory` the user's cache, while compiled kernels stay where they are."""
    return {"XDG_CACHE_HOME": str(directory), "NUMBA_CACHE_DIR": str(numba_config.CACHE_DIR)}


@contextmanager
def served(model: str, *options: str, env: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """Address and process id of a server with `model`, on a free port; `env` on top of what there is."""
    command = [sys.executable, "-m", "cli.main", "serve", model, "--port=0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | env) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+", server.stdout.readline())
            assert found, "the server did not start"
            yield found[0], server.pid
        finally:
            server.terminate()
