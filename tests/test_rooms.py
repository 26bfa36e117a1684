"""The map of docs/architecture.md: which room imports which, no circles, no torch where none is needed."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "abyssal"
ALL = None
ALLOWED: dict[str, set[str] | None] = {
    "base": set(),
    "arch": {"base"},
    "efficiency": {"base", "arch"},
    "quant": {"base"},
    "kernels": {"base", "quant"},
    "kvcache": {"base", "arch", "quant", "kernels"},
    "model": {"base", "arch", "quant", "kernels", "kvcache"},
    # beyond design.md: it runs blocks from disk, so it needs their state and products
    "checkpoint": {"base", "arch", "quant", "kernels", "kvcache", "model"},
    "encoding": {"base"},
    "engine": {"base", "arch", "kvcache", "model", "checkpoint", "kernels"},
    "chat": {"base", "encoding", "engine"},
    "server": {"base", "encoding", "chat"},
    "sandbox": {"base"},
    # design.md: everything but the server and what stands above
    "train": {
        *("base", "arch", "efficiency", "quant", "kernels", "kvcache", "model"),
        *("checkpoint", "encoding", "engine", "chat"),
    },
    "cli": ALL,
}


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file."""
    found = {}
    for path in package.rglob("*.py"):
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, root: str) -> set[str]:
    """Modules of the package that a file names in imports, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith(f"{root}.")}


def forbidden(package: Path) -> list[str]:
    """Imports that the table does not allow, and rooms that it does not know."""
    wrong = []
    for name, path in modules(package).items():
        if name == package.name:
            continue
        room = name.split(".")[1]
        if room not in ALLOWED:
            wrong.append(f"{room} is no room of the table")
            continue
        allowed = ALLOWED[room]
        for target in sorted(imports(path, package.name)):
            other = target.split(".")[1]
            if allowed is not None and other != room and other not in allowed:
                wrong.append(f"{name} imports {target}")
    return wrong


def circles(package: Path) -> list[str]:
    """Modules that import themselves through others."""
    known = modules(package)
    graph = {name: {t for t in imports(path, package.name) if t in known and t != name} for name, path in known.items()}
    done: set[str] = set()
    found: list[str] = []

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            found.append(" -> ".join((*trail[trail.index(name) :], name)))
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
    return found


def test_rooms_import_downwards_only() -> None:
    assert not forbidden(PACKAGE)


def test_there_are_no_circles() -> None:
    assert not circles(PACKAGE)


def write(package: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


def test_a_forbidden_import_is_found(tmp_path: Path) -> None:
    package = write(
        tmp_path / "pkg",
        {
            "arch/config.py": "def f():\n    from pkg.model.block import Block\n",
            "model/block.py": "from pkg.arch.config import f\n",
            "attic/old.py": "",
        },
    )
    assert sorted(forbidden(package)) == [
        "attic is no room of the table",
        "pkg.arch.config imports pkg.model.block",
        "pkg.arch.config imports pkg.model.block.Block",
    ]


def test_a_circle_is_found(tmp_path: Path) -> None:
    files = {"base/a.py": "import pkg.base.b", "base/b.py": "import pkg.base.c", "base/c.py": "import pkg.base.a"}
    package = write(tmp_path / "pkg", files)
    assert circles(package) == ["pkg.base.a -> pkg.base.b -> pkg.base.c -> pkg.base.a"]


@pytest.mark.parametrize("room", ["base", "arch", "efficiency", "encoding", "chat", "server", "sandbox"])
def test_rooms_without_torch(room: str) -> None:
    """Of chat, all but the module that runs our own engine; of sandbox, without Ray, all but what speaks to it."""
    apart = {"abyssal.chat.local"}
    if importlib.util.find_spec("ray") is None:
        apart |= {"abyssal.sandbox.scale.nodes", "abyssal.sandbox.scale.service"}
    names = [name for name in modules(PACKAGE) if name.startswith(f"abyssal.{room}") and name not in apart]
    script = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_module_says_what_it_is_for() -> None:
    bare = [name for name, path in modules(PACKAGE).items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not bare
