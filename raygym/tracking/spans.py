"""A span for each episode with its turns below it, as OpenTelemetry has them.

An episode is played by the same code as without: its environment and its policy are wrapped. Where no tracer is given,
nothing of OpenTelemetry is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raygym.env import StepResult
from raygym.env_host import Host
from raygym.episode import Generate
from raygym.types import Generation, Int32Array, Message, Sampling, Task, Trajectory


class EpisodeTrace:
    """What is traced of one episode: nothing, unless it is one of `Traces` with a tracer."""

    def host(self, host: Host) -> Host:
        """The environment to play on."""
        return host

    def generate(self, generate: Generate) -> Generate:
        """The policy to ask."""
        return generate

    def ended(self, trajectory: Trajectory) -> Trajectory:
        """Note what came of it; returns the same."""
        return trajectory


class Traces:
    """Makes the trace of each episode."""

    def __init__(self, tracer: Any = None) -> None:
        """`tracer`: OpenTelemetry's; None: nothing is traced."""
        self._tracer = tracer
        self._untraced = EpisodeTrace()

    @contextmanager
    def episode(self, task: Task, group_id: str, episode: int, attempt: int) -> Iterator[EpisodeTrace]:
        """The trace of one episode, which is played inside."""
        if self._tracer is None:
            yield self._untraced
            return
        trace = _Spans(self._tracer, task, group_id, episode, attempt)
        try:
            yield trace
        except BaseException as error:
            trace.failed(error)
            raise
        finally:
            trace.end()


class _Spans(EpisodeTrace):
    """episode > reset, turn > (generate, step), close."""

    def __init__(self, tracer: Any, task: Task, group_id: str, episode: int, attempt: int) -> None:
        self._tracer = tracer
        self._api: Any = importlib.import_module("opentelemetry.trace")
        no_parent = importlib.import_module("opentelemetry.context").Context()
        attributes = {
            "gen_ai.conversation.id": f"{group_id}-{episode}-{attempt}",
            "raygym.env": task.env,
            "raygym.task": task.index,
            "raygym.seed": task.seed,
            "raygym.split": task.split,
            "raygym.group_id": group_id,
            "raygym.episode": episode,
            "raygym.attempt": attempt,
        }
        self._episode: Any = tracer.start_span(f"episode {task.env}", context=no_parent, attributes=attributes)
        self._turn: Any = None
        self._turns = 0

    def host(self, host: Host) -> Host:
        return _SpannedHost(host, self)

    def generate(self, generate: Generate) -> Generate:
        async def traced(prompt_token_ids: Int32Array, sampling: Sampling, session_id: str) -> Generation:
            self.begin_turn()
            with self.below("generate", **{"gen_ai.usage.input_tokens": len(prompt_token_ids)}) as span:
                generation = await generate(prompt_token_ids, sampling, session_id)
                span.set_attribute("gen_ai.usage.output_tokens", len(generation.token_ids))
                span.set_attribute("gen_ai.response.finish_reasons", [generation.finish_reason])
                if len(generation.weight_versions):
                    span.set_attribute("raygym.weight_version", int(generation.weight_versions[-1]))
                return generation

        return traced

    def ended(self, trajectory: Trajectory) -> Trajectory:
        span = self._episode
        span.set_attribute("raygym.status", str(trajectory.status))
        span.set_attribute("raygym.reward", trajectory.reward)
        span.set_attribute("raygym.turns", len(trajectory.turns))
        span.set_attribute("gen_ai.usage.output_tokens", int(trajectory.loss_mask.sum()))
        if trajectory.failure is not None:
            span.set_attribute("raygym.failure", str(trajectory.failure))
            span.set_status(self._api.Status(self._api.StatusCode.ERROR, trajectory.failure_detail))
        return trajectory

    def failed(self, error: BaseException) -> None:
        """The episode came to no end of its own."""
        self._episode.set_status(self._api.Status(self._api.StatusCode.ERROR, f"{type(error).__name__}: {error}"))

    def end(self) -> None:
        """End what has begun."""
        self.end_turn()
        self._episode.end()

    def begin_turn(self) -> None:
        """The policy is asked for the next turn."""
        self.end_turn()
        context = self._api.set_span_in_context(self._episode)
        self._turn = self._tracer.start_span(f"turn {self._turns}", context=context)
        self._turns += 1

    def end_turn(self) -> None:
        """The environment has answered, or nobody will."""
        if self._turn is not None:
            self._turn.end()
            self._turn = None

    @contextmanager
    def below(self, name: str, **attributes: Any) -> Iterator[Any]:
        """A span below the turn, or below the episode where there is none. What is raised inside is its status."""
        parent = self._turn if self._turn is not None else self._episode
        span = self._tracer.start_span(name, context=self._api.set_span_in_context(parent), attributes=attributes)
        # As the current one, so that spans of a user's own client or environment come below it.
        with self._api.use_span(span, end_on_exit=True):
            yield span


class _SpannedHost:
    """A `Host` whose calls are spans."""

    def __init__(self, host: Host, spans: _Spans) -> None:
        self._host = host
        self._spans = spans
        self.tools = host.tools

    async def reset(self, task: Task, timeout_s: float) -> list[Message]:
        with self._spans.below("reset"):
            messages = await self._host.reset(task, timeout_s)
        self.tools = self._host.tools
        return messages

    async def step(self, action: Message, timeout_s: float) -> StepResult:
        with self._spans.below("step") as span:
            result = await self._host.step(action, timeout_s)
            span.set_attribute("raygym.reward", result.reward)
        self._spans.end_turn()
        return result

    async def close(self) -> None:
        self._spans.end_turn()
        with self._spans.below("close"):
            await self._host.close()
