"""The structure of the package, as docs/architecture.md draws it: layers, no circles, and what is light to import."""

import ast
import functools
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import zoft

PACKAGE = Path(zoft.__file__).parent
GROUND = ("errors", "events", "files", "folders", "memory", "quiet", "threads")
LAYERS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("compare", "demo"),
    ("metatrain", "deploy"),
    ("registry",),
    ("tasks", "optim"),
    ("tuner", "noise", "model"),
    ("weights",),
    GROUND,
)
DEPTH = {package: depth for depth, layer in enumerate(LAYERS) for package in layer}
CORE = {"zoft.optim.methods": "zoft.optim.core"}  # a layer of its own: core knows no method


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("zoft", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def imports() -> dict[str, frozenset[str]]:
    """The modules of zoft that each module imports, anywhere in its text: in functions and for types, too."""
    return {name: frozenset(_imported(path) - {name}) for name, path in modules().items()}


def _imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules() else node.module for name in whole}
    return found & set(modules())


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_package_has_a_layer() -> None:
    assert {package_of(name) for name in modules()} - {""} == set(DEPTH)


def allowed(name: str, other: str) -> bool:
    above, below = package_of(name), package_of(other)
    if above == below or "" in (above, below):
        return True
    return {above, below} <= set(GROUND) or DEPTH[above] < DEPTH[below]


def test_imports_point_downwards() -> None:
    """So `deploy` and `metatrain`, side by side, do not know each other."""
    wrong = [f"{name} imports {other}" for name in imports() for other in imports()[name] if not allowed(name, other)]
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize(("above", "below"), CORE.items())
def test_the_engine_knows_no_method(above: str, below: str) -> None:
    assert not [
        (name, other)
        for name, others in imports().items()
        for other in others
        if name.startswith(below) and other.startswith(above)
    ]


def test_no_module_imports_itself_by_a_detour() -> None:
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("zoft", {"torch"}),
        ("zoft.optim", {"transformers", "accelerate", "peft", "datasets", "huggingface_hub"}),
        ("zoft.cli.app", {"torch", "transformers"}),
    ],
)
def test_what_an_import_does_not_load(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not loaded, f"import {module} loads {', '.join(loaded)}"


def test_every_folder_says_what_lives_there() -> None:
    silent = [
        name
        for name, path in modules().items()
        if path.name == "__init__.py" and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent
