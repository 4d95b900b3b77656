"""Spans: an episode with its turns, whatever becomes of it, sent to where the environment variables say."""

from __future__ import annotations

import asyncio
import gzip
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import loaded
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from test_episode import TASK, WARM, Scripted, Talk

from raygym.chat import ChatRenderer
from raygym.env_host import EnvHost
from raygym.episode import EpisodeLimits, run_episode
from raygym.tracking.otlp import TracingOptions, missing_exporter, start_tracing
from raygym.tracking.spans import Traces
from raygym.types import EpisodeStatus, Generation, Int32Array, Sampling, Trajectory

LIMITS = EpisodeLimits(
    max_turns=4, max_tokens_per_turn=8, max_model_len=2048, turn_timeout_s=5, step_timeout_s=5, episode_timeout_s=20
)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traces(exporter: InMemorySpanExporter) -> Traces:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Traces(provider.get_tracer("test"))


async def traced(traces: Traces, env: Talk, generate: Any, number: int = 1) -> Trajectory:
    """As an EnvRunner plays it."""
    renderer = ChatRenderer(loaded.tokenizer("tiny"))
    with traces.episode(TASK, "g", number, 0) as trace:
        return trace.ended(
            await run_episode(
                trace.host(EnvHost(lambda: env)),
                TASK,
                group_id="g",
                episode=number,
                attempt=0,
                renderer_for=lambda tools: renderer,
                generate=trace.generate(generate),
                limits=LIMITS,
                sampling=WARM,
                run_seed=5,
            )
        )


def tree(spans: tuple[ReadableSpan, ...]) -> dict[str, list[str]]:
    """By each span's name, those of what is below it, in order of time."""
    names = {span.context.span_id: span.name for span in spans if span.context}
    below: dict[str, list[str]] = {}
    for span in sorted(spans, key=lambda span: span.start_time or 0):
        below.setdefault(names[span.parent.span_id] if span.parent else "", []).append(span.name)
    return below


async def test_an_episode_is_a_span_with_its_turns_below(traces: Traces, exporter: InMemorySpanExporter) -> None:
    trajectory = await traced(traces, Talk(2), Scripted([20, 21, 2], [22, 2]))
    spans = exporter.get_finished_spans()
    assert tree(spans) == {
        "": ["episode talk"],
        "episode talk": ["reset", "turn 0", "turn 1", "close"],
        "turn 0": ["generate", "step"],
        "turn 1": ["generate", "step"],
    }
    (episode,) = [span for span in spans if span.parent is None]
    assert episode.attributes is not None
    told = dict(episode.attributes)
    assert told["raygym.reward"] == trajectory.reward == 0.5 and told["raygym.turns"] == 2
    assert told["raygym.status"] == "terminated" and told["gen_ai.conversation.id"] == "g-1-0"
    assert told["gen_ai.usage.output_tokens"] == 5
    generated = [dict(span.attributes or {}) for span in spans if span.name == "generate"]
    assert [span["gen_ai.usage.output_tokens"] for span in generated] == [3, 2]
    assert [span["raygym.weight_version"] for span in generated] == [3, 3]
    assert all(span.end_time for span in spans)


async def test_a_failed_episode_is_a_span_with_its_cause(traces: Traces, exporter: InMemorySpanExporter) -> None:
    async def broken(prompt: Int32Array, sampling: Sampling, session: str) -> Generation:
        raise RuntimeError("no engine")

    trajectory = await traced(traces, Talk(2), broken)
    assert trajectory.status is EpisodeStatus.FAILED
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"episode talk", "reset", "turn 0", "generate", "close"}
    assert not spans["generate"].status.is_ok and not spans["episode talk"].status.is_ok
    assert (spans["episode talk"].attributes or {})["raygym.failure"] == "engine_error"


async def test_a_cancelled_episode_ends_its_spans(traces: Traces, exporter: InMemorySpanExporter) -> None:
    async def slow(prompt: Int32Array, sampling: Sampling, session: str) -> Generation:
        asked.set()
        await asyncio.sleep(30)
        raise AssertionError

    asked = asyncio.Event()
    playing = asyncio.create_task(traced(traces, Talk(2), slow))
    await asked.wait()
    playing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await playing
    await asyncio.sleep(0)
    assert {span.name for span in exporter.get_finished_spans()} >= {"episode talk", "turn 0", "generate", "close"}


async def test_episodes_at_once_are_not_below_each_other(traces: Traces, exporter: InMemorySpanExporter) -> None:
    await asyncio.gather(*(traced(traces, Talk(2), Scripted(), number) for number in range(8)))
    spans = exporter.get_finished_spans()
    assert len({span.context.trace_id for span in spans if span.context}) == 8
    assert sum(span.parent is None for span in spans) == 8
    assert len(spans) == 8 * 9


async def test_nothing_is_wrapped_where_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    host, generate = EnvHost(Talk), Scripted()
    with Traces().episode(TASK, "g", 1, 0) as trace:
        assert trace.host(host) is host and trace.generate(generate) is generate
    await host.close()  # it has a thread of the other tests' by now


@pytest.mark.parametrize(
    ("wanted", "environment", "on"),
    [
        (None, {}, False),
        (None, {"OTEL_SERVICE_NAME": "x"}, False),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, True),
        (None, {"OTEL_TRACES_EXPORTER": "console"}, True),
        (True, {}, True),
        (False, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, False),
        (True, {"OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_who_asks_for_spans(wanted: bool | None, environment: dict[str, str], on: bool) -> None:
    options = TracingOptions.of("r", wanted, environment | {"PATH": "/"})
    assert (options is not None) == on
    assert options is None or dict(options.variables) == environment


def test_what_cannot_be_sent_is_told_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_exporter(TracingOptions("r")) == ""
    assert "expected otlp or console" in missing_exporter(TracingOptions("r", {"OTEL_TRACES_EXPORTER": "jaeger"}))
    wrong = {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}
    assert "expected http/protobuf or grpc" in missing_exporter(TracingOptions("r", wrong))
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert "raygym[otel]" in missing_exporter(TracingOptions("r"))


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """A server that takes OTLP over HTTP."""
    taken: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = ExportTraceServiceRequest()
            request.ParseFromString(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
            taken.append(request)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", taken
    server.shutdown()
    thread.join()
    server.server_close()


async def test_spans_arrive_where_the_variables_say(
    collector: tuple[str, list[ExportTraceServiceRequest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, taken = collector
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    options = TracingOptions.of("a run", None, {"OTEL_EXPORTER_OTLP_ENDPOINT": address})
    assert options is not None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)  # undone afterwards, as what is set by it is not
    provider = start_tracing(options)
    await traced(Traces(provider.get_tracer("raygym")), Talk(1), Scripted())
    assert await asyncio.to_thread(provider.force_flush, 60_000)
    provider.shutdown()
    # More than one request where the episode took longer than a batch waits.
    found = [spans for request in taken for spans in request.resource_spans]
    for spans in found:
        about = {item.key: item.value.string_value for item in spans.resource.attributes}
        assert about["service.name"] == "raygym" and about["raygym.run"] == "a run"
    names = [span.name for spans in found for scope in spans.scope_spans for span in scope.spans]
    assert set(names) >= {"episode talk", "turn 0", "generate"} and len(names) == len(set(names))
