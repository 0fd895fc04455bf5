"""The web page at `/`: a few files, sent as they are and without a key. All that it shows it asks the API for."""

from pathlib import Path

from fastapi import APIRouter, Response

from hybrid.serve.refusal import Refusal

PAGE = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# The page runs its own scripts and talks to its own server; what a model writes can do neither.
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data: blob:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # after an update nobody should look at the old one
}


def page_router() -> APIRouter:
    """`/`, and its files under `/page/`."""
    files = {path.name: path for path in PAGE.iterdir() if path.suffix in TYPES}
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def index() -> Response:
        return _send(files["index.html"])

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in files:
            raise Refusal(404, f"The page has no {name}.")
        return _send(files[name])

    return router


def _send(path: Path) -> Response:
    return Response(path.read_bytes(), headers={**HEADERS, "content-type": TYPES[path.suffix]})
