"""The shape of the house: which room may use which, how long a file may be, and what the product never imports."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the ground up. A module may import from its own rank and from those below, inside functions too.
RANKS = [
    ["jaxinfer.errors", "jaxinfer.paths", "jaxinfer.huge_pages", "jaxinfer.machine", "jaxinfer.eval.data"],
    ["pallas_kernels"],
    ["jaxinfer.ops"],
    ["jaxinfer.cache"],
    ["jaxinfer.models"],
    ["jaxinfer.text", "jaxinfer.checkpoint", "jaxinfer.tree", "jaxinfer.passes.layout"],
    ["jaxinfer.decode"],
    ["jaxinfer.program"],
    ["jaxinfer.passes", "jaxinfer.sharding"],
    ["jaxinfer.device", "jaxinfer.session", "jaxinfer.generation", "jaxinfer.loading", "jaxinfer.speculation"],
    ["jaxinfer.skeleton"],
    ["jaxinfer.train", "jaxinfer.plan", "jaxinfer.eval"],
    ["jaxinfer.configuration", "jaxinfer.cli", "jaxinfer"],
]
ORACLES = {"torch", "transformers", "llama_cpp", "accelerate", "sentencepiece"}
NEED_ORACLES = {"gpu_peer_worker", "make_goldens", "make_model_goldens", "make_tokenizer_goldens", "cpu_peer_worker"}
LINES = 250
LONGER = {"jaxinfer/models/transformer.py": 300, "pallas_kernels/": 500, "tests/": 400}

PRODUCT = sorted(p for top in ("jaxinfer", "pallas_kernels") for p in (ROOT / top).rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str = "", package: bool = False) -> set[str]:
    """Return the dotted names that a module imports anywhere in it; those for type checkers only count too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")
                above = above[: len(above) - node.level + package]
                base = ".".join([*above, base] if base else above)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def rank(name: str) -> int | None:
    """Return the rank of the longest listed prefix of a dotted name, or None outside the house."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        for i, level in enumerate(RANKS):
            if ".".join(parts[:end]) in level:
                return i
    return None


def violations(module: str, imported: set[str]) -> list[str]:
    own = rank(module)
    up = [name for name in imported if rank(name) is not None and rank(name) > own]
    if module.startswith("pallas_kernels"):
        up = [name for name in imported if name.split(".")[0] == "jaxinfer"]
    return sorted(f"{module} imports {name}" for name in up)


def test_imports_point_down():
    found = []
    for path in PRODUCT:
        module = module_name(path)
        found += violations(module, imports(path.read_text(), module, path.name == "__init__.py"))
    assert found == []


def test_every_room_has_a_rank():
    rooms = {".".join(module_name(path).split(".")[:2]) for path in PRODUCT}
    listed = {name for level in RANKS for name in level}
    assert {room for room in rooms if room.startswith("jaxinfer")} <= listed


def test_the_check_sees_what_it_should():
    inside = "def f():\n    from jaxinfer.decode import loop\n    import jaxinfer.cli.chat"
    assert violations("jaxinfer.ops.norm", imports(inside)) == [
        "jaxinfer.ops.norm imports jaxinfer.cli.chat",
        "jaxinfer.ops.norm imports jaxinfer.decode.loop",
    ]
    relative = imports("from ..models import layers", "jaxinfer.ops.norm")
    assert relative == {"jaxinfer.models.layers"} and violations("jaxinfer.ops.norm", relative)
    assert imports("from . import layers", "jaxinfer.models", package=True) == {"jaxinfer.models.layers"}
    assert violations("jaxinfer.program", imports("from jaxinfer import load"))  # the top is above all
    assert violations("pallas_kernels.a", imports("from jaxinfer.errors import InputError"))
    assert violations("jaxinfer.decode.base", imports("from jaxinfer.models.layers import Linear\nimport jax")) == []


def test_oracles_stay_outside():
    users = {
        path.relative_to(ROOT).as_posix()
        for path in PRODUCT + TESTS + SCRIPTS
        if {name.split(".")[0] for name in imports(path.read_text())} & ORACLES
    }
    assert users <= {f"scripts/{name}.py" for name in NEED_ORACLES}


def test_no_file_is_too_long():
    long = []
    for path in PRODUCT + TESTS + SCRIPTS:
        name = path.relative_to(ROOT).as_posix()
        cap = next((cap for start, cap in LONGER.items() if name.startswith(start)), LINES)
        lines = len(path.read_text().splitlines())
        if lines > cap:
            long.append(f"{name}: {lines} lines, the cap is {cap}")
    assert long == []


def test_modules_and_public_names_are_documented():
    silent = []
    for path in PRODUCT:
        tree = ast.parse(path.read_text())
        if tree.body and not ast.get_docstring(tree):
            silent.append(module_name(path))
        for node in tree.body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                silent.append(f"{module_name(path)}.{node.name}")
    assert silent == []


def test_the_public_names_exist_and_are_documented():
    import jaxinfer

    assert sorted(dir(jaxinfer)) == sorted([*jaxinfer.__all__, "__version__"])
    for name in jaxinfer.__all__:
        assert inspect.getdoc(getattr(jaxinfer, name)), name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = jaxinfer.no_such_name
    asked = {"load", "save", "generate_text", "stream_text", "generate", "logits", "perplexity"}
    assert asked <= set(jaxinfer.__all__)


def test_every_module_can_be_imported():
    for path in PRODUCT:
        if path.name != "__main__.py":
            importlib.import_module(module_name(path))
