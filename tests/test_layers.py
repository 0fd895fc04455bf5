"""The layering rule: imports point down, wherever in a file they stand. See CONTRIBUTING."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A room may import rooms further down this list's right-hand sides, itself, and the floor of `hybrid`.
FLOOR = {"hybrid.errors", "hybrid.progress", "hybrid.stats", "hybrid.config", "hybrid.config_json"}
ALLOWED = {
    "quant": set(),
    "hybrid.errors": set(),
    "hybrid.progress": set(),
    "hybrid.stats": set(),
    "hybrid.config_json": FLOOR,
    "hybrid.config": FLOOR,
    "hybrid.device": FLOOR,
    "hybrid.hub": FLOOR | {"hybrid.memory.hardware"},
    "hybrid.chat": FLOOR,
    "hybrid.checkpoint": FLOOR | {"hybrid.chat.tokenizer", "hybrid.chat.template", "quant"},
    "hybrid.memory": FLOOR | {"hybrid.checkpoint", "quant"},
    "hybrid.model": FLOOR | {"hybrid.memory", "hybrid.checkpoint", "quant"},
    "hybrid.engine": FLOOR | {"hybrid.model", "hybrid.memory"},
    "hybrid.convert": FLOOR
    | {"hybrid.checkpoint", "hybrid.memory.hardware", "hybrid.memory.kv_format", "hybrid.device", "quant"},
    "hybrid.demo": FLOOR | {"hybrid.checkpoint", "hybrid.chat", "quant"},
    "hybrid.reply": FLOOR | {"hybrid.chat", "hybrid.engine"},
    "hybrid.kimi": FLOOR
    | {"hybrid.reply", "hybrid.device", "hybrid.chat", "hybrid.checkpoint", "hybrid.names", "hybrid.engine"}
    | {"hybrid.memory", "hybrid.model"},
    "hybrid.pocket": FLOOR,
    "hybrid.names": FLOOR | {"hybrid.demo", "hybrid.pocket"},
    "hybrid.likelihood": FLOOR | {"hybrid.chat", "hybrid.engine.request"},
    "hybrid.grammar": FLOOR | {"hybrid.chat"},
    "hybrid.running": FLOOR | {"hybrid.memory.remembered"},
    "hybrid.attached_reply": FLOOR | {"hybrid.chat"},
    "hybrid.attached": FLOOR | {"hybrid.chat", "hybrid.attached_reply"},
    "hybrid.batch": FLOOR
    | {"hybrid.chat", "hybrid.checkpoint", "hybrid.memory", "hybrid.engine.request", "hybrid.engine.sampler"}
    | {"hybrid.grammar", "hybrid.likelihood", "hybrid.kimi"},
    "hybrid.serve": FLOOR
    | {"hybrid.chat", "hybrid.engine.request", "hybrid.engine.sampler", "hybrid.grammar", "hybrid.likelihood"}
    | {"hybrid.kimi", "hybrid.reply"},
    "hybrid.evaluation": FLOOR | {"hybrid.chat", "hybrid.engine.sampler", "hybrid.kimi"},
    "hybrid": {"hybrid.kimi", "hybrid.engine.sampler"},
    "cli": {"hybrid", "quant"},
}
HEAVY = {"torch", "numba", "llvmlite", "safetensors", "numpy"}
WITHOUT_TORCH = ("quant", "hybrid.chat", "hybrid.attached", "hybrid.running", "cli")


def modules() -> list[tuple[str, Path]]:
    found = []
    for top in ("quant", "hybrid", "cli"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def room(module: str) -> str:
    """The most specific entry of ALLOWED that `module` belongs to."""
    return max((name for name in ALLOWED if module == name or module.startswith(f"{name}.")), key=len)


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in a file, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, rooms: set[str]) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in rooms)


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_point_down(module: str, path: Path) -> None:
    own = room(module)
    ours = {name for name in imports(path) if name.split(".")[0] in ("quant", "hybrid", "cli", "tests", "tools")}
    upward = sorted(name for name in ours if not within(name, ALLOWED[own] | {own}))
    assert not upward, f"{module} ({own}) must not import {upward}"


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_rooms_without_torch(module: str, path: Path) -> None:
    if module.startswith(WITHOUT_TORCH):
        assert not {name for name in imports(path) if name.split(".")[0] == "torch"}


def test_cli_needs_nothing_heavy() -> None:
    for module, path in modules():
        if module.startswith("cli"):
            heavy = {name for name in imports(path) if name.split(".")[0] in HEAVY}
            assert not heavy, f"{module} imports {sorted(heavy)}"


def test_no_cycles_between_modules() -> None:
    names = {module for module, _ in modules()}
    graph = {}
    for module, path in modules():
        targets = set()
        for name in imports(path):
            while name and name not in names:
                name = name.rpartition(".")[0]
            targets.add(name)
        graph[module] = targets - {"", module}
    visiting: list[str] = []
    done: set[str] = set()

    def visit(module: str) -> None:
        assert module not in visiting, f"circle: {' -> '.join([*visiting[visiting.index(module) :], module])}"
        if module in done:
            return
        visiting.append(module)
        for target in sorted(graph[module]):
            # a package's __init__ re-exports its own modules; they do not depend on it
            if not module.startswith(f"{target}."):
                visit(target)
        visiting.pop()
        done.add(module)

    for module in sorted(graph):
        visit(module)
