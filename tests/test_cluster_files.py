"""What configs/cluster/ ships, as far as it can be tried without a cluster: schemas, linters, Slurm by stand-ins."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml

from raygym.config import RunConfig
from raygym.config_file import load_config

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "configs/cluster"
BIN = Path(sys.executable).parent
KUBERAY = os.environ.get("RAYGYM_KUBERAY_CRD")
GPU = "nvidia.com/gpu"


def locked(package: str) -> str:
    [version] = re.findall(rf"^{package}==(\S+)$", (ROOT / "requirements/cpu.txt").read_text(), flags=re.MULTILINE)
    return str(version)


def config_of(command: str) -> RunConfig:
    """What a file's `raygym train ...` would run; the image has the project in /opt/raygym."""
    words = shlex.split(command)
    start = words.index("train")
    assert Path(words[start - 1]).name == "raygym"
    path = words[start + 1].removeprefix("/opt/raygym/")
    return load_config(str(ROOT / path), [word for word in words[start + 2 :] if "=" in word])


@pytest.fixture(scope="module")
def rayjob() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / "rayjob.yaml").read_text(encoding="utf-8"))
    return loaded


def test_the_rayjob_asks_for_what_its_run_needs(rayjob: dict[str, Any]) -> None:
    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    spec = rayjob["spec"]
    config = config_of(spec["entrypoint"])
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == locked("ray")
    [workers] = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] == workers["replicas"] == workers["maxReplicas"]
    [container] = workers["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"][GPU]) * workers["replicas"]
    policy, learner = config.policy, config.learner
    assert gpus == policy.replicas * policy.gpus_per_replica + learner.num_learners * learner.gpus_per_learner
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        # Kubernetes takes no other request of GPUs than the limit, and neither should memory be promised twice.
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted == {"runs": config.runs_dir, "shm": "/dev/shm"}
        assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    # What goes on after a lost cluster must have been kept somewhere.
    assert spec["backoffLimit"] > 0 and config.checkpoint.every and config.checkpoint.mirror


def strict(schema: Any) -> Any:
    """Kubernetes leaves unknown fields away; here they are errors."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if isinstance(schema.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in schema:
        found.setdefault("additionalProperties", False)
    return found


@pytest.mark.skipif(not KUBERAY, reason="RAYGYM_KUBERAY_CRD names no ray.io_rayjobs.yaml of KubeRay")
def test_the_rayjob_by_kuberays_own_schema(rayjob: dict[str, Any]) -> None:
    definition = yaml.safe_load(Path(str(KUBERAY)).read_text(encoding="utf-8"))
    [schema] = [v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema["properties"]["spec"] = strict(schema["properties"]["spec"])
    jsonschema.Draft7Validator(schema).validate(rayjob)


@pytest.mark.ray
@pytest.mark.parametrize("name", ["ray_up_aws.yaml", "ray_up_machines.yaml"])
def test_rays_launcher_takes_its_files(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = (FOLDER / name).read_text(encoding="utf-8")
    validate_config(prepare_config(yaml.safe_load(text)))
    wrong = yaml.safe_load(text) | {"head_node_typo": "head"}
    with pytest.raises(jsonschema.ValidationError, match="head_node_typo"):
        validate_config(wrong)
    [command] = re.findall(r"ray exec \S+ '(.*)'", text)
    config_of(command.rpartition("&&")[2])


@pytest.mark.parametrize("name", ["ray_up_aws.yaml", "ray_up_machines.yaml"])
def test_what_is_run_by_rays_launcher_joins_its_cluster(name: str) -> None:
    # Ray's launcher sets neither: without an address raygym would start a cluster of its own on the head.
    text = (FOLDER / name).read_text(encoding="utf-8")
    [command] = re.findall(r"ray exec \S+ '(.*)'", text)
    words = shlex.split(command.rpartition("&&")[2])
    assert "RAY_ADDRESS=auto" in words
    assert "RAY_AUTH_MODE=token" in words or "--env RAY_AUTH_MODE=token" in text


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.gpu"])
def test_hadolint_finds_nothing(name: str) -> None:
    done = subprocess.run([BIN / "hadolint", FOLDER / name], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_images_have_what_the_lock_and_the_project_say() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name in ("Dockerfile.cpu", "Dockerfile.gpu"):
        text = (FOLDER / name).read_text(encoding="utf-8")
        for package, version in re.findall(r"([\w-]+)==([\w.+]+?)(?=[\s\\]|$)", text):
            expected = locked(package)
            assert version == (expected if name == "Dockerfile.cpu" else expected.partition("+")[0]), package
        for source in re.findall(r"^COPY (\S+) ", text, flags=re.MULTILINE):
            assert (ROOT / source).exists(), source
        for extras in re.findall(r"\.\[([\w,]+)\]", text):
            assert set(extras.split(",")) <= project["optional-dependencies"].keys()
        [command] = re.findall(r"^CMD (\[.*\])$", text, flags=re.MULTILINE)
        assert json.loads(command)[0] in project["scripts"]


def test_what_is_built_is_not_sent_to_the_image() -> None:
    left_out = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv", "runs"} <= set(left_out)


def test_shellcheck_finds_nothing() -> None:
    script = FOLDER / "slurm.sbatch"
    for command in (["bash", "-n", script], [BIN / "shellcheck", script]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


LOGGED = '#!/bin/bash\necho "$(basename "$0") $* RAY_ADDRESS=${RAY_ADDRESS-}" >> "$LOG"\n'
STAND_INS = {
    "scontrol": LOGGED + "if [[ $1 == show ]]; then echo alpha; echo beta; echo gamma; fi\n",
    # Runs what comes after its own options here, as `srun` does elsewhere.
    "srun": LOGGED + 'while [[ $1 == --* ]]; do shift; done; exec "$@"\n',
    "hostname": "#!/bin/bash\necho '127.0.0.1 10.9.8.7'\n",
    "ray": LOGGED + 'if [[ $2 == --head ]]; then exec "$PYTHON" -c "$LISTEN" "$@"; fi\nexec sleep 60\n',
    "python": '#!/bin/bash\nif [[ $1 == -c ]]; then exec "$PYTHON" "$@"; fi\ncat > "$LOG.joined"\n'
    # As the real one: until all nodes have joined.
    "until (( $(grep -c '^ray ' \"$LOG\") == 2 )); do sleep 0.05; done\n",
    "raygym": LOGGED + 'echo "token ${#RAY_AUTH_TOKEN} $RAY_AUTH_MODE" >> "$LOG"\neval "$RAYGYM_DOES"\n',
}
LISTEN = """
import socket, sys
port = next(word for word in sys.argv if word.startswith('--port=')).split('=')[1]
server = socket.create_server(('127.0.0.1', int(port)))
while True:
    server.accept()
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a job on three nodes whose commands are stand-ins that note how they were called."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    yield {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(tmp_path / "log"), "PYTHON": sys.executable, "LISTEN": LISTEN,
        "SLURM_JOB_NODELIST": "[alpha,beta,gamma]", "SLURM_JOB_ID": str(os.getpid()), "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_ON_NODE": "64", "RAYGYM_DOES": "exit 0",
    }  # fmt: skip


def submitted(slurm: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(FOLDER / "slurm.sbatch"), *arguments], env=slurm, cwd=Path(slurm["LOG"]).parent, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("code", [0, 2])
def test_slurm_starts_ray_on_each_node_and_the_run_on_the_first(slurm: dict[str, str], code: int) -> None:
    slurm["RAYGYM_DOES"] = f"exit {code}"
    job = submitted(slurm, "run.yaml", "learner.lr=1e-6")
    assert job.wait(100) == code, job.stderr and job.stderr.read()
    log = Path(slurm["LOG"]).read_text(encoding="utf-8")
    address = f"127.0.0.1:{20000 + os.getpid() % 10000}"
    assert "ray start --head --node-ip-address=127.0.0.1 --port=" in log
    assert f"--nodes=2 --ntasks-per-node=1 --exclude=alpha ray start --address={address}" in log
    assert log.count("--num-cpus=64 --num-gpus=8") == 4  # head and workers, by srun and by ray
    assert f"raygym train run.yaml learner.lr=1e-6 RAY_ADDRESS={address}\ntoken 64 token" in log
    assert "scontrol requeue" not in log
    assert Path(slurm["LOG"] + ".joined").read_text().startswith("import sys")
    # A head that is told of another one's address would join it.
    assert re.search(r"^ray start --head .* RAY_ADDRESS=$", log, flags=re.MULTILINE)


@pytest.mark.parametrize(("ends", "again"), [("exit 130", True), ("exit 0", False)])
def test_slurms_signal_reaches_the_run_and_the_job_is_queued_again(
    slurm: dict[str, str], ends: str, again: bool
) -> None:
    slurm["RAYGYM_DOES"] = f"trap '{ends}' TERM; echo ready >> \"$LOG\"; while true; do sleep 0.1; done"
    job, log = submitted(slurm, "run.yaml"), Path(slurm["LOG"])
    # It sleeps once it waits for the run, with its trap set; until then the signal would end the script itself.
    while not (log.exists() and "ready" in log.read_text() and psutil.Process(job.pid).status() == "sleeping"):
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(100) == int(ends.split()[1])
    assert ("scontrol requeue" in log.read_text()) == again


def test_slurm_without_a_config_says_how_it_is_used(slurm: dict[str, str]) -> None:
    job = submitted(slurm)
    assert job.wait(100) == 2 and job.stderr is not None
    assert job.stderr.read().startswith("usage: sbatch ")
