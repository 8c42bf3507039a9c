"""The structure of the code: imports run downhill and close no circle, files stay short, the loop
and a step fit on a screen each.
"""

import ast
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("megatron_gkd", "checkpoint_tools", "demo", "benchmarks")
MOST_LINES = 400
MOST_LINES_OF_A_TEST = 500
MOST_FILES = 400  # a bound against a generated tree by mistake


def files() -> dict[str, Path]:
    """Module name -> file, of the package and what stands on it."""
    found = {}
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    assert 80 < len(found) < MOST_FILES
    return found


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, wherever in the file."""
    modules = files()
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module and not node.level, f"{path}:{node.lineno}: a relative import"
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    names.add(full if full in modules else node.module)
        found[module] = {name for name in names if name in modules and name != module}
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of nodes that reach each other (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return found


def room(module: str) -> str:
    """The folder of a file; a file at the top of the package is a room of its own."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "megatron_gkd" else parts[0]


@cache
def rooms() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = defaultdict(set)
    for module, others in imports().items():
        graph[room(module)] |= {room(other) for other in others} - {room(module)}
    return graph


def test_no_circle_between_files():
    assert circles(imports()) == []


def test_no_circle_between_folders():
    assert circles(rooms()) == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


@pytest.mark.parametrize(
    "below, above",
    [
        ("model", "lora media formats loss data rollout forward build train checkpoint config"),
        ("loss", "model lora media formats data rollout forward build train"),
        ("lora", "media data rollout forward build train"),
        ("formats", "lora media data rollout forward build train"),
        ("media", "data rollout forward build train"),
        ("data", "lora rollout forward build train checkpoint"),
        ("forward", "rollout build train checkpoint"),
        ("rollout", "build train checkpoint"),
    ],
)
def test_imports_run_downhill(below, above):
    others = {f"megatron_gkd.{name}" for name in above.split()}
    assert rooms()[f"megatron_gkd.{below}"] & others == set()


def longer_than(most: int, paths: Iterable[Path]) -> dict[str, int]:
    """File -> its number of lines, of those that have more than `most`."""
    lengths = {
        str(path.relative_to(REPOSITORY)): len(path.read_text(encoding="utf-8").splitlines())
        for path in paths
    }
    return {name: lines for name, lines in lengths.items() if lines > most}


def test_files_stay_short():
    assert longer_than(MOST_LINES, files().values()) == {}


def test_tests_stay_short():
    paths = sorted((REPOSITORY / "tests").glob("*.py"))
    assert 60 < len(paths) < MOST_FILES
    assert longer_than(MOST_LINES_OF_A_TEST, paths) == {}


def test_the_loop_and_a_step_fit_on_a_screen():
    tree = ast.parse((REPOSITORY / "megatron_gkd/train.py").read_text(encoding="utf-8"))
    lengths = {
        node.name: node.end_lineno - node.lineno + 1
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name in ("train", "train_step")
    }
    assert len(lengths) == 2 and max(lengths.values()) <= 40
