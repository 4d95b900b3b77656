"""The layering: `raygym/` is pure, `actors/` is the Ray layer, each heavy engine is imported by one file only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiers import only_long

ROOT = Path(__file__).parent.parent
HEAVY = {"ray", "vllm", "deepspeed"}
PURE = sorted(path for path in (ROOT / "raygym").rglob("*.py") if "actors" not in path.relative_to(ROOT).parts)
ACTORS = sorted((ROOT / "actors").glob("*.py"))


def imported_packages(path: Path) -> Iterator[str]:
    """Top-level packages that a file imports, at whatever depth: at its top, in a function, under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PURE, ids=shown)
def test_pure_modules_name_no_engine(path):
    assert not HEAVY & set(imported_packages(path))


@pytest.mark.parametrize("path", PURE, ids=shown)
def test_only_the_command_line_reaches_into_the_ray_layer(path):
    source = ast.parse(path.read_text(encoding="utf-8"))
    reached = [
        node
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom | ast.Import)
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        if name.startswith("raygym.actors") or (name == "actors")
    ]
    if path.name != "cli.py":
        assert not reached, [node.lineno for node in reached]


@pytest.mark.ray
def test_the_driver_loads_neither_pytorch_nor_transformers():
    # Everybody waits for it, and it only names the classes of its actors.
    code = "import sys, raygym.actors.runs, raygym.actors.rollout_command\n"
    code += "print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()", done.stderr


@only_long
def test_importing_the_pure_modules_loads_no_engine():
    names = [module_name(path) for path in PURE if path.name != "__main__.py"]
    code = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\n"
    code += f"print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize(("package", "owner"), [("vllm", "vllm_engine.py"), ("deepspeed", "learner.py")])
def test_an_engine_is_imported_by_one_file(package, owner):
    importers = {path.name for path in ACTORS if package in set(imported_packages(path))}
    assert importers == {owner}


def test_actors_are_one_link_away():
    link = ROOT / "raygym" / "actors"
    assert link.is_symlink()
    assert link.readlink() == Path("../actors")


@pytest.mark.parametrize("path", ACTORS, ids=shown)
def test_no_remote_wait_is_without_a_deadline(path):
    """`ray.get(...)` and Serve's `.results(...)` name a timeout, whoever writes the next one.

    Serve's own questions to its controller cannot: `serving.applications` asks in their place.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            is_get = node.func.attr == "get" and isinstance(node.func.value, ast.Name) and node.func.value.id == "ray"
            if is_get or node.func.attr == "results":
                assert {"timeout", "timeout_s"} & {keyword.arg for keyword in node.keywords}, node.lineno
            assert node.func.attr not in ("status", "get_serve_details"), node.lineno


def test_what_is_asked_of_learners_is_a_method_of_theirs():
    """Learners are asked by name, so nothing else notices before it is asked."""
    [learner] = [
        node
        for node in ast.parse((ROOT / "actors/learner.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "Learner"
    ]
    methods = {node.name for node in learner.body if isinstance(node, ast.FunctionDef)}
    asked = {
        argument.value: path.name
        for path in ACTORS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        if getattr(node.func, "attr", getattr(node.func, "id", "")) in ("ask", "call_first", "call_all", "_submit")
        for argument in node.args[:2]
        if isinstance(argument, ast.Constant)
    }
    assert {"setup", "update", "weight_node", "publish_weights"} <= set(asked)
    assert {name: where for name, where in asked.items() if name not in methods} == {}
