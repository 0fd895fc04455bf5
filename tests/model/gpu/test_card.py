"""When our kernels are used, and what is said when they are not."""

import pytest
import torch

from hybrid.errors import KimiError
from hybrid.model import gpu
from hybrid.model.gpu import Card, check, find_card, launch

CPU = torch.device("cpu")


def test_a_cpu_needs_no_reason() -> None:
    assert find_card(CPU) == (None, "")


def test_without_triton_the_reason_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    card, reason = find_card(torch.device("cuda"))
    assert card is None and "pip install triton" in reason and "\n" not in reason


def test_kernels_that_compute_what_they_should_are_used(card: Card) -> None:
    assert check.first_failure(card) == ""


def test_a_card_that_computes_something_else_is_not_used(card: Card) -> None:
    def careless(kernel, grid, *arguments, **constants) -> None:  # type: ignore[no-untyped-def]
        launch(kernel, grid, *arguments, **constants)
        for argument in arguments:
            if isinstance(argument, torch.Tensor) and argument.dtype == torch.float32:
                argument *= 1.01

    failure = check.first_failure(Card(card.device, careless))
    assert "came out wrong" in failure and "\n" not in failure


def test_a_card_that_fails_is_not_used(card: Card) -> None:
    def failing(*arguments: object, **constants: object) -> None:
        raise RuntimeError("no kernel image is available\nand more")

    failure = check.first_failure(Card(card.device, failing))
    assert failure == "Our GPU kernels are not used: trellis experts failed: no kernel image is available"


def test_a_failure_later_is_one_line(card: Card) -> None:
    class Broken:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            raise RuntimeError("out of resources\nfar more")

        class fn:
            pass

    with pytest.raises(KimiError, match=r"^The GPU kernel fn failed: out of resources Try --device cpu\.$"):
        launch(Broken(), (1,))
