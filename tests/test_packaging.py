"""What a user installs: the wheel built from the sdist carries the Ray layer as raygym.actors, and only there."""

import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import raygym

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that `build` makes from it (not from the checkout), without a network."""
    out = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def wheel_names(built):
    with zipfile.ZipFile(built[1]) as archive:
        return archive.namelist()


@pytest.mark.ray  # the wheel, installed, imports raygym.actors
@pytest.mark.slow
@pytest.mark.timeout(400)
class TestWheel:
    def test_has_every_module_as_a_real_file(self, built, wheel_names):
        sources = {f"raygym/actors/{path.name}" for path in (ROOT / "actors").glob("*.py")}
        sources |= {str(path.relative_to(ROOT)) for path in (ROOT / "raygym").rglob("*.py")}
        assert sources <= set(wheel_names)
        with zipfile.ZipFile(built[1]) as archive:
            assert archive.read("raygym/actors/__init__.py") == (ROOT / "actors" / "__init__.py").read_bytes()

    def test_has_every_data_file(self, wheel_names):
        data = [path for path in (ROOT / "raygym").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert {str(path.relative_to(ROOT)) for path in data} <= set(wheel_names)
        assert "raygym/py.typed" in wheel_names

    def test_has_nothing_else_at_the_top(self, wheel_names):
        assert {name.split("/")[0] for name in wheel_names} == {"raygym", f"raygym-{raygym.__version__}.dist-info"}

    def test_sdist_has_no_links(self, built):
        with tarfile.open(built[0]) as archive:
            assert not [member.name for member in archive if member.issym() or member.islnk()]

    def test_works_in_an_empty_environment(self, built, tmp_path):
        venv.create(tmp_path / "env", with_pip=False)
        python = tmp_path / "env" / "bin" / "python"
        install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", built[1]]
        done = run(*install, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        good = run(python, "-c", "import raygym.actors; print(raygym.actors.__file__)", cwd=tmp_path)
        assert good.returncode == 0, good.stderr
        assert str(tmp_path / "env") in good.stdout
        bad = run(python, "-c", "import actors", cwd=tmp_path)
        assert "No module named 'actors'" in bad.stderr
        assert (tmp_path / "env" / "bin" / "raygym").is_file()


def test_a_plain_import_of_actors_is_refused_in_the_checkout():
    done = run(sys.executable, "-c", "import actors", cwd=ROOT)
    assert done.returncode != 0
    assert "write `import raygym.actors`" in done.stderr


def test_version_is_said_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == raygym.__version__


def test_lock_covers_the_declared_dependencies():
    """Every runtime, cpu and dev requirement is pinned in the lock at a version that it allows."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {}
    for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["cpu"], *extras["dev"], *extras["envs"]]:
        requirement = Requirement(text)
        if requirement.name == "raygym":  # dev includes another extra
            assert requirement.extras <= set(extras)
            continue
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text
    assert not pins.keys() & {"torchvision", "torchaudio", "torchcodec", "triton", "llm", "llama-cpp-python"}
