"""Direct reads: the same bytes as any other way of reading, wherever they lie, and errors that name the file."""

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.errors import CheckpointError
from hybrid.memory.direct import DirectFile
from quant import aligned
from quant.aligned import PAGE

SIZE = 9 * PAGE + 123


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direct") / "file.bin"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


@given(
    st.integers(0, SIZE), st.lists(st.integers(0, 3 * PAGE), max_size=4), st.booleans(), st.sampled_from([300, PAGE])
)
def test_any_bytes_of_a_file(path: Path, offset: int, sizes: list[int], pages: bool, most: int) -> None:
    """Read whole or in short reads, on page bounds or not."""
    if pages:
        offset, sizes = offset // PAGE * PAGE, [size // PAGE * PAGE for size in sizes]

    def reluctant(descriptor: int, buffers: Sequence[memoryview], at: int) -> int:
        return min(os.preadv(descriptor, buffers, at), most)

    content = path.read_bytes()
    for preadv in (os.preadv, reluctant):
        targets = [aligned.empty((size,)) for size in sizes]
        with closing(DirectFile(path, preadv)) as file:
            if offset + sum(sizes) > SIZE:
                with pytest.raises(CheckpointError, match=r"file.bin is damaged: it ends before byte"):
                    file.read(offset, targets)
            else:
                file.read(offset, targets)
                assert b"".join(map(bytes, targets)) == content[offset : offset + sum(sizes)]


def test_pages_are_read_past_the_page_cache(path: Path) -> None:
    asked: list[bool] = []

    def noting(descriptor: int, buffers: Sequence[memoryview], at: int) -> int:
        asked.append(bool(int(Path(f"/proc/self/fdinfo/{descriptor}").read_text().split()[3], 8) & os.O_DIRECT))
        return os.preadv(descriptor, buffers, at)

    with closing(DirectFile(path, noting)) as file:
        file.read(PAGE, [aligned.empty((2 * PAGE,)), aligned.empty((PAGE,))])
        file.read(PAGE, [aligned.empty((100,))])
        file.read(1, [aligned.empty((PAGE,))])
        file.read(0, [aligned.empty((2 * PAGE,))[1 : PAGE + 1]])
    assert asked in ([True, False, False, False], [False] * 4), "the second where the file system does not take it"


def failing(code: int) -> Callable[[int, Sequence[memoryview], int], int]:
    def preadv(descriptor: int, buffers: Sequence[memoryview], at: int) -> int:
        raise OSError(code, os.strerror(code))

    return preadv


@pytest.mark.parametrize(("code", "reason"), [(errno.EIO, "the drive failed"), (errno.ENXIO, os.strerror(errno.ENXIO))])
def test_errors_name_file_place_and_cause(path: Path, code: int, reason: str) -> None:
    with (
        closing(DirectFile(path, failing(code))) as file,
        pytest.raises(CheckpointError, match=rf"file.bin cannot be read at byte 4,096: {reason}\. What was"),
    ):
        file.read(PAGE, [aligned.empty((PAGE,))])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none.bin: No such file"):
        DirectFile(tmp_path / "none.bin")
