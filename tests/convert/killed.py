"""A process of its own that quantizes, is killed, and begins again until it gets through.

    python killed.py SRC DST SEED [--delete-source]

Children of this process do the work. Each is killed (SIGKILL) either after a random time or at a random one of the
system calls that write, some of them done by half. Prints how many were killed.
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from hybrid.convert import Settings, quantize

CALLS = ("pwrite", "write", "fsync", "replace", "rename", "unlink", "ftruncate")
SETTINGS = Settings(bits=2.6, resident="int8")


def die_at(count: int, by_half: bool) -> None:
    """Kill this process at the `count`-th of CALLS from now, before it happens or in its middle."""
    left = [count]

    def dying(name: str) -> Any:
        call = getattr(os, name)

        def step(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if by_half and name in ("pwrite", "write"):
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return step

    for name in CALLS:
        setattr(os, name, dying(name))


def work(source: Path, target: Path, delete_source: bool) -> None:
    """What a child does; never returns."""
    try:
        quantize(source, target, SETTINGS, threads=2, delete_source=delete_source)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    source, target, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    for killed in range(1000):
        by_time, count, by_half, seconds = rng.random() < 0.2, rng.randint(1, 30), rng.random() < 0.5, rng.random()
        child = os.fork()
        if child == 0:
            if not by_time:
                die_at(count, by_half)
            work(source, target, "--delete-source" in sys.argv)
        if by_time:
            time.sleep(0.3 * seconds)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            print(killed)
            sys.exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
