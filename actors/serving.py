"""Start and stop the PolicyServer on Ray Serve, from the driver."""

from __future__ import annotations

import json
import os
import queue
import re
import threading
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayError
from ray.serve._private.common import DeploymentID
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.context import _get_global_client as get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from raygym.actors.policy_server import DEPLOYMENT, PolicyServer
from raygym.actors.session_router import SessionRouter
from raygym.actors.simulated_deaths import forget_deaths
from raygym.api.front import FrontOptions
from raygym.api.sampling import SamplingProfile
from raygym.config import ConfigError, PolicyConfig, RunConfig
from raygym.simulate import SimulatedConfig

# The engine and the learner share the cores of a CPU machine and rarely work at the same time.
_CPU_ENGINE_ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Threads that wait leave their core to whoever works: the learner, other engines.
    "OMP_WAIT_POLICY": "PASSIVE",
}
# Blocks of 32 tokens, the smallest that vLLM takes on CPU: its default of 128 caches nothing of a short history.
_CPU_ENGINE_OPTIONS: dict[str, Any] = {"enforce_eager": True, "dtype": "float32", "block_size": 32}
_CPU_BATCH_TOKENS = 4096
_CONTROLLER_TIMEOUT_S = 30.0
_UNDEPLOY_TIMEOUT_S = 120.0
_EVERY_ENGINE_ENV = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


# One event loop in a replica instead of two, with a thread change each way in every call: a fifth less latency and half
# as many calls a second more. Nothing in a replica blocks its loop once the engine is up.
_REPLICA_ENV = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}


def app_name(run_name: str) -> str:
    """The Serve application of one run."""
    return f"raygym-{run_name}"


def run_name(app: str) -> str:
    """The run that a Serve application is of; the other way round."""
    return app.removeprefix(app_name(""))


def engine_environment(config: PolicyConfig) -> dict[str, str]:
    """Environment variables of a replica; whatever the user exported wins."""
    environment = _EVERY_ENGINE_ENV | _REPLICA_ENV
    if config.gpus_per_replica == 0:
        cores = os.cpu_count() or 1
        environment |= _CPU_ENGINE_ENV | {"OMP_NUM_THREADS": str(max(1, cores // config.replicas))}
    return {key: os.environ.get(key, value) for key, value in environment.items()}


def context_length(config: PolicyConfig, model_dir: str) -> int:
    """Tokens that fit into the engine's context, prompt and generation together."""
    if config.engine == "simulated":
        return SimulatedConfig(**config.simulated).max_model_len
    if "max_model_len" in config.vllm:
        return int(config.vllm["max_model_len"])
    return int(json.loads((Path(model_dir) / "config.json").read_text())["max_position_embeddings"])


def with_engine_defaults(config: PolicyConfig, model_dir: str) -> PolicyConfig:
    """The config with vLLM options that suit a CPU, where the user set none and no GPU is used.

    A simulated engine's config comes back with the content of the files that it names.

    Raises:
        ConfigError: chunked prefill was asked for on a CPU.
    """
    if config.engine == "simulated":
        # Files of measured times are read here: a replica on another node may not have them.
        simulated = SimulatedConfig(**config.simulated).model_dump(exclude_unset=True)
        return config.model_copy(update={"simulated": simulated})
    if config.gpus_per_replica > 0:
        return config
    if config.vllm.get("enable_chunked_prefill"):
        raise ConfigError(
            "policy.vllm.enable_chunked_prefill: must be false on CPU, where vLLM's engine dies when it cuts the "
            "prompt of a seeded request into chunks (PyTorch's CPU generator has no offset to rewind)"
        )
    # Without chunks a whole prompt has to fit into one batch.
    batch = max(_CPU_BATCH_TOKENS, context_length(config, model_dir))
    options = {**_CPU_ENGINE_OPTIONS, "max_num_batched_tokens": batch, **config.vllm, "enable_chunked_prefill": False}
    return config.model_copy(update={"vllm": options})


def front_options(config: RunConfig) -> FrontOptions:
    """How HTTP calls of a run are served: its key, its limits, its sampling.

    Raises:
        ConfigError: `policy.api_key_env` names a variable that is not set.
    """
    policy = config.policy
    key = os.environ.get(policy.api_key_env, "") if policy.api_key_env else ""
    if policy.api_key_env and not key:
        raise ConfigError(
            f"policy.api_key_env: the environment variable {policy.api_key_env} is not set; expected it to hold the "
            "key that HTTP clients send"
        )
    strict = policy.strict_sampling
    return FrontOptions(
        api_key=key,
        max_body_bytes=policy.http.max_body_mib << 20,
        profiles={
            "train": SamplingProfile(config.rollout.temperature, strict),
            "validation": SamplingProfile(config.validation.temperature, strict),
        },
    )


def deploy(
    run_name: str,
    config: PolicyConfig,
    model_dir: str,
    port: int,
    front: FrontOptions | None = None,
    *,
    leased: bool = False,
) -> DeploymentHandle[Any]:
    """Deploy all replicas and wait until they serve.

    Args:
        run_name: names the Serve application.
        config: `policy`, with `with_engine_defaults` applied.
        model_dir: the policy's files, on every node.
        port: where HTTP listens, on `policy.http.host`.
        front: how HTTP calls are served; `front_options` of a run.
        leased: replicas serve only while a driver confirms that their weights are current; see `raygym.lease`.

    Raises:
        RuntimeError: a replica could not start; the text carries its reason.
        TimeoutError: not all replicas serve after `policy.startup_timeout_s`.
    """
    serve.start(http_options=HTTPOptions(host=config.http.host, port=port))
    forget_deaths(app_name(run_name))
    actor_options: dict[str, Any] = {
        "num_cpus": 0,
        "num_gpus": config.gpus_per_replica,
        "runtime_env": {"env_vars": engine_environment(config)},
    }
    # Ray's stubs take `deployment` for a bare decorator.
    router: Any = SessionRouter
    deployment: Any = serve.deployment(
        PolicyServer,
        name=DEPLOYMENT,
        num_replicas=config.replicas,
        max_ongoing_requests=100_000,
        ray_actor_options=actor_options,
        health_check_period_s=5,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=1,
        request_router_config=RequestRouterConfig(request_router_class=router),
    )
    application = deployment.bind(config, model_dir, front, leased)
    try:
        return serve.run(application, name=app_name(run_name), route_prefix="/", external_scaler_enabled=True)
    except RuntimeError as error:
        reason = _replica_error(app_name(run_name)) or str(error)
        raise RuntimeError(f"a PolicyServer replica could not start: {reason}") from None


def _replica_error(app: str) -> str:
    """What the exception said that ended the last replica, on one line; Serve itself says only that it failed."""
    deployments = applications().get(app, {}).get("deployments", {})
    text = str(deployments.get(DEPLOYMENT, {}).get("message", ""))
    lines = text.rstrip().splitlines()
    raised = [number for number, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    said = lines[raised[-1] :] if raised else []
    return " ".join(line.strip() for line in said if "For further information" not in line)


def scale(run_name: str, replicas: int) -> None:
    """Change how many replicas a deployed PolicyServer has; returns at once.

    Those that come take turns as soon as they hold the current weights. Those that go finish nothing: what they had in
    hand is tried again elsewhere.

    Args:
        run_name: as it was deployed.
        replicas: from now on.

    Raises:
        ConfigError: nothing of this name is deployed, or there would be no replica.
        TimeoutError: Serve does not answer.
    """
    if replicas < 1:
        raise ConfigError(f"policy.replicas: {replicas} leaves nobody to take turns; expected 1 or more")
    app = app_name(run_name)
    if app not in applications():
        raise ConfigError(f"name: no run {run_name} is deployed on this cluster; expected a run that is going on")
    # What Serve's own HTTP endpoint for scalers calls; that one needs the cluster's dashboard.
    _ask_controller("update_deployment_replicas", DeploymentID(name=DEPLOYMENT, app_name=app), replicas)


def wanted_replicas(run_name: str) -> int | None:
    """How many replicas a deployed PolicyServer is to have now; None where Serve does not say."""
    try:
        return int(applications()[app_name(run_name)]["deployments"][DEPLOYMENT]["target_num_replicas"])
    except (RayServeException, RayError, TimeoutError, KeyError):
        return None


def applications() -> dict[str, Any]:
    """What Serve tells of its applications, by name; none where it does not run.

    Raises:
        TimeoutError: its controller does not answer. Serve's own ways to ask it wait without end.
    """
    if get_global_client(raise_if_no_controller_running=False) is None:
        return {}
    details: dict[str, Any] = _ask_controller("get_serve_instance_details")
    found: dict[str, Any] = details["applications"]
    return found


def _ask_controller(method: str, *args: Any) -> Any:
    client = get_global_client()
    assert client is not None, "without one it raises"
    try:
        return ray.get(getattr(client._controller, method).remote(*args), timeout=_CONTROLLER_TIMEOUT_S)
    except GetTimeoutError:
        raise TimeoutError(f"Serve's controller gave no answer within {_CONTROLLER_TIMEOUT_S:g} s ({method})") from None


def undeploy(run_name: str, timeout_s: float = _UNDEPLOY_TIMEOUT_S) -> None:
    """Remove the application and wait until its replicas, and the engines' processes with them, are gone.

    Raises:
        TimeoutError: they are not after `timeout_s`.
    """
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def delete() -> None:
        try:
            serve.delete(app_name(run_name), _blocking=True)
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    # Serve itself waits without end for a controller that nobody can start again.
    threading.Thread(target=delete, name="undeploy", daemon=True).start()
    try:
        error = ended.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(f"the application {app_name(run_name)} was not gone after {timeout_s:g} s") from None
    if error is not None and not isinstance(error, RayServeException):  # Serve was never started: nothing to remove
        raise error
