"""Sockets; a whole server is in conftest, and as a process in tests/cli."""

from __future__ import annotations

import pytest

from hybrid.errors import KimiError
from hybrid.serve.server import bind, url


@pytest.mark.parametrize(("host", "form"), [("127.0.0.1", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
def test_a_port_is_taken_once(host: str, form: str) -> None:
    with bind(host, 0) as bound:
        assert url(bound).startswith(form)
        with pytest.raises(KimiError, match="cannot be used.*--port"):
            bind(host, bound.getsockname()[1])


def test_an_address_of_nobody() -> None:
    with pytest.raises(KimiError, match="--host"):
        bind("no such host", 0)
    with pytest.raises(KimiError, match="203.0.113.1"):
        bind("203.0.113.1", 0)
