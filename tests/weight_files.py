"""Stand-ins that make tests of weights quick: a sender without a learner, and engines that are simulated."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file

from raygym.config import PolicyConfig
from raygym.models import resolve_policy
from raygym.weights import Manifest, Sending, plan_manifest

_STEP = 0.07


def changed_weights(original: dict[str, torch.Tensor], version: int) -> dict[str, torch.Tensor]:
    """What `ModelFiles` makes of the policy's files, so that versions are told apart by their logprobs."""
    return {name: weight * (1 + _STEP * version) for name, weight in original.items()}


class ModelFiles:
    """In place of learners: an actor that sends the weights of the policy's files, or others as it is told."""

    weight_ranks = 1

    def __init__(self, model_dir: str, **options: Any) -> None:
        """`options` are Ray's, for the actor."""
        import ray

        from raygym.actors.weight_sender import WeightSender
        from raygym.weight_slots import OpenSlots

        step = _STEP

        class Sender:  # in here, since workers cannot import this module
            def __init__(self) -> None:
                self.weights = self.original = load_file(f"{model_dir}/model.safetensors")
                self.corrupted = 0

            def weight_node(self) -> str:
                return str(ray.get_runtime_context().get_node_id())

            def weight_manifest(self, bucket_bytes: int) -> Manifest:
                return plan_manifest([(name, w.shape) for name, w in self.weights.items()], "float32", bucket_bytes)

            def change(self, version: int) -> None:
                self.weights = {name: weight * (1 + step * version) for name, weight in self.original.items()}

            def corrupt(self, times: int) -> None:
                self.corrupted = times

            def ping(self) -> int:
                return 0

            def open_slots(self, paths: list[str], base: int) -> None:
                self.sender = WeightSender(OpenSlots(paths, base))

            def drop_slots(self) -> None:
                self.sender.slots = None

            def join_weight_group(self, group: str, size: int, timeout_s: float) -> None:
                self.sender.join(group, size, timeout_s)

            def publish_weights(
                self, manifest: Manifest, slot: int, buckets: Any, sending: Sending, timeout_s: float
            ) -> Any:
                named = lambda names: ((n, self.weights[n]) for n in names)  # noqa: E731
                sent = self.sender.send(manifest, named, slot, buckets, timeout_s, sending)
                if self.corrupted:
                    self.corrupted -= 1
                    self.sender.slots.data(slot)[manifest.buckets[buckets[-1]].start] ^= 0x40
                return sent

        self.actor: Any = ray.remote(Sender).options(num_cpus=0, **options).remote()
        ray.get(self.actor.ping.remote(), timeout=300)  # its start is no part of the deadlines of a sync

    def call(self, method: str, *args: Any) -> Any:
        return self.call_first(method, *args, timeout_s=120)

    def call_first(self, method: str, *args: Any, timeout_s: float) -> Any:
        import ray
        from ray.exceptions import RayError

        from raygym.actors.learner_group import LearnerError

        try:
            return ray.get(getattr(self.actor, method).remote(*args), timeout=timeout_s)
        except RayError as error:
            raise LearnerError(f"learner rank 0 of 1 failed in {method}: {error}") from error

    def publish_weights(self, *args: Any) -> Any:
        return self.call_first("publish_weights", *args, timeout_s=2 * args[-1] + 10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def simulated_engines(run_name: str, replicas: int, **simulated: Any) -> Iterator[tuple[Any, str]]:
    """A PolicyServer of simulated engines that serve by lease; yields its handle and the model's folder."""
    from ray import serve

    from raygym.actors import serving

    model_dir = str(resolve_policy("tiny"))
    config = PolicyConfig(model="tiny", replicas=replicas, engine="simulated", simulated=simulated)
    config = serving.with_engine_defaults(config, model_dir)
    try:
        yield serving.deploy(run_name, config, model_dir, free_port(), leased=True), model_dir
    finally:
        serving.undeploy(run_name)
        serve.shutdown()
