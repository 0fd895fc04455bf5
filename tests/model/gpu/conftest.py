"""Without a card the kernels run in Triton's interpreter."""

from importlib.util import find_spec

import pytest
import torch

from hybrid.model.gpu import Card, launch


def interpret() -> None:
    """Have kernels interpreted: those decorated from now on, and those of Triton itself, imported already or not."""
    import triton.language as tl
    from triton import knobs
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    knobs.runtime.interpret = True
    for module in (tl, tl.standard):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))


if find_spec("triton") is None:  # an extra, and not for every system
    collect_ignore_glob = ["test_*.py"]
elif not torch.cuda.is_available():
    interpret()


@pytest.fixture(scope="session")
def card() -> Card:
    """What runs our kernels: the machine's card, or the interpreter."""
    return Card(torch.device("cuda" if torch.cuda.is_available() else "cpu"), launch)
