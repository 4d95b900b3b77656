"""The documentation is true: its code runs, its configs are valid, its commands exist, its links lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from doc_blocks import ALL, PAGES, ROOT, Block, anchors, blocks, links, slug

import raygym
from raygym import cli
from raygym.check_env import check_env
from raygym.config import ConfigError, RunConfig
from raygym.config_file import load_config, parse_config
from raygym.testing import chaos

BASE: dict[str, Any] = {
    "name": "docs", "steps": 1, "policy": {"model": "tiny"}, "envs": [{"id": "raygym/NumberGuess-v0"}]
}  # fmt: skip
# Pages of what is not merged yet are tested as soon as it is.
WAITS_FOR = {"tracking.md": "raygym.tracking", "python-api.md": "raygym.python_api"}
NOT_THERE_YET = {"view": "raygym.viewer", "report": "raygym.report", "doctor": "raygym.doctor"}
# Of these a test knows no more than that they are a shell's.
FOREIGN = {"docker", "kubectl", "sbatch", "export", "cd", "git", "jupyter", "ssh", "source", "python3"}


def is_here(module: str | None) -> bool:
    return module is None or importlib.util.find_spec(module) is not None


def of(*languages: str) -> list[Any]:
    """Blocks, as parameters of a test."""
    found = [block for block in ALL if block.language in languages]
    return [
        pytest.param(block, id=str(block), marks=pytest.mark.skipif(not is_here(module), reason=f"waits for {module}"))
        for block in found
        for module in [WAITS_FOR.get(block.page.name)]
    ]


def test_no_block_is_left_out() -> None:
    """Every block says what it is, and each kind has a test below. `text` is what something prints, or a drawing."""
    kinds = Counter(block.language for block in ALL)
    assert set(kinds) <= {"python", "yaml", "bash", "json", "text"}, [str(b) for b in ALL if not b.language]
    assert sum(kinds.values()) == sum(p.read_text().count("```") for p in PAGES) // 2
    why_not = {str(block): block.not_run for block in ALL if block.not_run}
    # A block that is not run should be a rare thing: look at it before you raise this number.
    assert len(why_not) <= 8, why_not
    assert all(block.language in {"bash", "python"} for block in ALL if block.not_run)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of a user's own, with the files that blocks name, and `configs/`."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for block in ALL:
        if block.file and "/" not in block.file:
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
    known = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("block", of("yaml"))
def test_configs_are_valid(block: Block, written: Path) -> None:
    """A whole config by itself, or a part of one in a run that has no more than it must."""
    part = yaml.safe_load(block.text)
    assert isinstance(part, dict) and part
    if "kind" in part:  # Kubernetes
        return
    parse_config(BASE | part)
    for key in part:  # a part that is no key of ours would have been refused, and so is a wrong one in it
        with pytest.raises(ConfigError):
            parse_config(BASE | part | {f"{key}_typo": part[key]})


@pytest.mark.parametrize("block", of("python"))
def test_python_runs(block: Block, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"__name__": "docs"}
    if block.not_run:
        check_calls(ast.parse(block.text))
        return
    if "openai" in block.text:
        names |= conversation(monkeypatch)
    exec(compile(block.text, str(block), "exec"), names)
    if "openai" in block.text:
        assert served[0]["logprobs"] is True
        assert names["messages"][1]["generation_token_ids"] == [5, 6], "the IDs travel along"
    if block.file:
        classes = [c for c in names.values() if inspect.isclass(c) and c.__module__ == "docs"]
        assert classes
        for found in classes:
            assert check_env(f"{block.file.removesuffix('.py')}:{found.__name__}", {}) == []


def check_calls(tree: ast.Module) -> None:
    """What is called of raygym exists and takes these arguments."""
    calls = [call for call in ast.walk(tree) if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)]
    ours = [call for call in calls if isinstance(call.func.value, ast.Name) and call.func.value.id == "rg"]  # type: ignore[attr-defined]
    assert ours
    for call in ours:
        assert isinstance(call.func, ast.Attribute)
        signature = inspect.signature(getattr(raygym, call.func.attr))
        signature.bind(*call.args, **{str(keyword.arg): keyword.value for keyword in call.keywords})


served: list[dict[str, Any]] = []


def conversation(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """OpenAI's own client, at a server that answers as raygym's does."""

    def answer(request: httpx.Request) -> httpx.Response:
        served.append(json.loads(request.content))
        message = {"role": "assistant", "content": "7", "prompt_token_ids": [1, 2], "generation_token_ids": [5, 6],
                   "generation_log_probs": [-0.1, -0.2]}  # fmt: skip
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        body = {"id": "c", "object": "chat.completion", "created": 1, "model": "policy", "choices": [choice]}
        return httpx.Response(200, json=body)

    served.clear()
    real = openai.OpenAI
    transport = httpx.MockTransport(answer)
    monkeypatch.setattr(openai, "OpenAI", lambda **key: real(http_client=httpx.Client(transport=transport), **key))
    return {"name": "policy", "messages": [{"role": "user", "content": "Guess."}]}


@pytest.mark.parametrize("block", of("json"))
def test_json_is_json(block: Block, tmp_path: Path) -> None:
    value = json.loads(block.text)
    if "faults" in value:
        (tmp_path / "plan.json").write_text(block.text, encoding="utf-8")
        assert len(chaos.Plan.load(tmp_path / "plan.json").faults) == len(value["faults"])


@pytest.mark.parametrize("block", of("bash"))
def test_commands_exist(block: Block, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert block.commands
    for words in block.commands:
        check_command(words, block)
    capsys.readouterr()


def check_command(words: list[str], block: Block) -> None:
    """Raise where the command cannot be what a reader may type."""
    while re.fullmatch(r"\w+=\S*", words[0]):  # variables before it
        words = words[1:]
    match words:
        case ["raygym", *arguments] | ["python", "-m", "raygym", *arguments]:
            check_raygym(arguments, block)
        case ["ray", "job", "submit", *_]:
            check_command(words[words.index("--") + 1 :], block)
        case ["ray", "up" | "down" | "exec", file, *rest]:
            assert (ROOT / file).is_file() and block.not_run
            if rest:
                check_raygym(rest[0].split("raygym ", 1)[1].split(), block)
        case ["make", *targets]:
            made = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert set(targets) <= set(made), targets
        case ["python", script, *arguments]:
            text = (ROOT / script).read_text(encoding="utf-8")
            assert all(word in text for word in arguments if word.startswith("--")), words
        case ["pip", "install", *wanted]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
                "optional-dependencies"
            ]
            for name in wanted:
                for extra in re.findall(r"^(?:raygym|\.)\[([\w,]+)\]", name):
                    assert set(extra.split(",")) <= extras.keys(), name
        case [command, *rest]:
            assert command in FOREIGN, f"{block}: nobody knows what {command} is"
            assert block.not_run or command in {"export", "cd", "source"}, f"{block}: say why {command} is not run"
            for word in rest:
                if word.startswith("configs/"):
                    assert (ROOT / word).exists(), word


def check_raygym(arguments: list[str], block: Block) -> None:
    """By the command line's own parser; what is cheap is run."""
    if not is_here(NOT_THERE_YET.get(arguments[0])):
        return
    options = cli._options(arguments)
    if config := getattr(options, "config", None):
        load_config(config, options.overrides)
    if options.command in {"env", "config"} and not block.not_run:
        assert cli.main(arguments) == cli.DONE, block


def commands() -> set[str]:
    """The names of raygym's commands."""
    actions = cli._parser()._subparsers
    assert actions is not None
    return {name for action in actions._group_actions for name in (action.choices or {})}


def test_commands_in_tables_exist() -> None:
    """`raygym ...` within a text, too."""
    for page in PAGES:
        for name in re.findall(r"`raygym ([a-z]+)[ `]", page.read_text(encoding="utf-8")):
            assert name in commands() or not is_here(NOT_THERE_YET.get(name)), f"{page.name}: raygym {name}"


def test_keys_in_tables_exist() -> None:
    """`section.key` within a text names a key of the config, or another thing that is known to look like one."""
    fields = RunConfig.model_fields
    sources = [*(ROOT / "raygym").glob("*.py"), *(ROOT / "actors").glob("*.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in sources)
    checked = 0
    for page in (page for page in PAGES if is_here(WAITS_FOR.get(page.name))):
        for section, key in re.findall(
            r"`([a-z]+)\.([a-z_]+)(?:\.[\w*]+)?(?:[:`= ])", page.read_text(encoding="utf-8")
        ):
            inner = getattr(fields[section].annotation, "model_fields", None) if section in fields else None
            if inner and f'"{section}.{key}' not in source:  # a point of raygym.testing.chaos
                assert key in inner, f"{page.name}: {section}.{key}"
                checked += 1
        for section, table in re.findall(
            r"^\|[^|\n]*`([a-z]+)\.?`[^|\n]*\|.*\n\|--.*\n((?:\|.*\n)+)", page.read_text(), re.M
        ):
            inner = getattr(fields[section].annotation, "model_fields", None) if section in fields else None
            for row in table.splitlines() if inner else ():
                for key in re.findall(r"(?:^ |, )`([a-z_]+)", row.split("|")[1]):
                    assert inner is not None and key in inner, f"{page.name}: {section}: {key}"
                    checked += 1
    assert checked > 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {target}"


def test_every_page_can_be_reached() -> None:
    seen, left = set[Path](), [ROOT / "README.md"]
    while left:
        page = left.pop()
        seen.add(page)
        found = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
        left += [path for path in found if path.suffix == ".md" and path.exists() and path not in seen]
    assert set(PAGES) <= seen


def test_a_newcomer_is_told_where_the_command_is() -> None:
    # `make` puts it into a virtual environment.
    shell = [line for block in ALL if block.page.name == "README.md" and block.language == "bash"
             for line in block.text.splitlines()]  # fmt: skip
    first = next(number for number, line in enumerate(shell) if line.startswith("raygym "))
    assert any(line.startswith("source .venv/bin/activate") for line in shell[:first])


def test_the_gpu_install_of_the_guide_is_that_of_the_image() -> None:
    image = (ROOT / "configs/cluster/Dockerfile.gpu").read_text(encoding="utf-8")
    guide = (ROOT / "docs/guides/scaling.md").read_text(encoding="utf-8")
    pinned = [line for line in guide.splitlines() if line.startswith("pip install torch")]
    assert len(pinned) == 1 and f"RUN {pinned[0]}" in image


def test_the_readme_is_two_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 140


def test_the_blocks_of_a_page_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b` c, d\n<!-- not run: no x -->\n```bash\na \\\n  b  # c\n```\n```yaml\n# d.yaml\n```\n[x](y.md#z)\n"
    )
    first, second = blocks(page)
    assert (first.language, first.not_run, first.commands) == ("bash", "no x", [["a", "b"]])
    assert (second.language, second.not_run, second.file) == ("yaml", None, "d.yaml")
    assert links(page) == ["y.md#z"] and anchors(page) == {slug("A `b` c, d")} == {"a-b-c-d"}


@pytest.mark.timeout(400)
def test_the_reference_is_made_of_the_docstrings(tmp_path: Path) -> None:
    """Of a few modules: all of them take a quarter of a minute."""
    made = subprocess.run(
        [sys.executable, "tools/api_reference.py", "--out", tmp_path, "raygym", "raygym.config", "raygym.env"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=380, check=False,
    )  # fmt: skip
    assert made.returncode == 0 and "Warn" not in made.stderr, made.stderr
    page = (tmp_path / "raygym/config.html").read_text(encoding="utf-8")
    assert "When the run is saved, so that it can go on from there" in page
    assert "to which checkpoints are copied" in page
    assert "ChatEnv" in (tmp_path / "raygym.html").read_text(encoding="utf-8")


def _metrics_of_the_code() -> set[str]:
    """Names of metrics in the modules that make them; of the parts that vary only their name, as `env/<env>/step_s`."""
    families = {"reward", "val", "policy", "groups", "advantage", "episodes", "env", "length", "tokens", "time",
                "learn", "sync", "manager", "supervision", "alarms", "grad"}  # fmt: skip
    files = ["raygym/metrics.py", "raygym/batch_statistics.py", "raygym/supervision.py", "raygym/validation.py",
             "raygym/alarm_watch.py", "actors/trainer.py"]  # fmt: skip
    found = set()
    for node in (node for file in files for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))):
        match node:
            case ast.Constant(value=str(name)) if re.fullmatch(r"[a-z]+(/\w+)+", name):
                found.add(name)
            case ast.JoinedStr():
                found.add(re.sub(r"\{(\w+)\}", r"<\1>", ast.unparse(node)[2:-1]))
            case ast.Call(func=ast.Attribute(attr="_timed"), args=[ast.Constant(value=part)]):
                found.add(f"time/{part}_s")
    named = {name for name in found if re.fullmatch(r"[\w/<>]+[\w>]", name)} - {"time/<name>_s"}
    return {name for name in named if name.partition("/")[0] in families}


def test_every_metric_is_on_its_page_and_none_that_is_not_there() -> None:
    page = (ROOT / "docs/guides/metrics.md").read_text(encoding="utf-8")
    table = page.partition("## Every metric")[2].partition("## Alarms")[0]
    first_column = "\n".join(re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE))
    told = {name for name in re.findall(r"`([\w/<>]+)`", table) if "/" in name}
    made = _metrics_of_the_code()
    assert {"env/<env>/step_s", "time/checkpoint_s", "sync/checksum"} <= made and "`loss`" in first_column
    assert made - told == set()
    assert told - made == set()


def test_the_map_names_every_module() -> None:
    """CONTRIBUTING.md's table: a module by its name, what is in a folder by the folder's."""
    named = set(re.findall(r"`([\w/]+?)/?`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    modules = [path for folder in ("raygym", "actors") for path in (ROOT / folder).glob("*.py")]
    assert not [path.stem for path in modules if path.stem not in named and not path.stem.startswith("__")]
    folders = [path.parent.name for path in (ROOT / "raygym").glob("*/__init__.py") if path.parent.name != "actors"]
    assert not [name for name in folders if name not in named]
