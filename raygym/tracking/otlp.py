"""Where spans are sent: what OpenTelemetry's own environment variables say."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_TURNED_ON_BY = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER")
_PROTOCOLS = {
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
}


@dataclass(frozen=True, slots=True)
class TracingOptions:
    """What a process on another machine needs to send spans to where the driver would."""

    run: str
    variables: Mapping[str, str] = field(default_factory=dict)
    """The driver's OTEL_*; those of the process itself go before."""

    @classmethod
    def of(cls, run: str, wanted: bool | None, environment: Mapping[str, str]) -> TracingOptions | None:
        """Those of a run; None where it is not traced. `wanted`: `logging.opentelemetry`."""
        on = any(environment.get(name) for name in _TURNED_ON_BY) if wanted is None else wanted
        if not on or environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
            return None
        return cls(run, {name: value for name, value in environment.items() if name.startswith("OTEL_")})


def missing_exporter(options: TracingOptions) -> str:
    """What has to be installed to send spans like that, in a sentence; empty where it is there."""
    try:
        _exporter_class(options.variables)
    except (ImportError, ValueError) as error:
        return f"no spans are sent: {error}"
    return ""


def start_tracing(options: TracingOptions) -> Any:
    """OpenTelemetry's provider of tracers in this process, which sends in a thread of its own.

    Raises:
        ImportError: a package is missing.
        ValueError: a variable says what is not known.
    """
    for name, value in options.variables.items():
        os.environ.setdefault(name, value)
    exporter = _exporter_class(os.environ)()
    sdk: Any = importlib.import_module("opentelemetry.sdk.trace")
    export: Any = importlib.import_module("opentelemetry.sdk.trace.export")
    resources: Any = importlib.import_module("opentelemetry.sdk.resources")
    attributes = {"raygym.run": options.run}
    if "OTEL_SERVICE_NAME" not in os.environ and "service.name=" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        attributes["service.name"] = "raygym"
    provider = sdk.TracerProvider(resource=resources.Resource.create(attributes))
    provider.add_span_processor(export.BatchSpanProcessor(exporter))
    return provider


def _exporter_class(environment: Mapping[str, str]) -> Any:
    kind = environment.get("OTEL_TRACES_EXPORTER") or "otlp"
    if kind == "console":
        return importlib.import_module("opentelemetry.sdk.trace.export").ConsoleSpanExporter
    if kind != "otlp":
        raise ValueError(f"OTEL_TRACES_EXPORTER is {kind!r}; expected otlp or console")
    protocol = (
        environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or "http/protobuf"
    )
    if protocol not in _PROTOCOLS:
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}; expected {' or '.join(_PROTOCOLS)}")
    try:
        return importlib.import_module(_PROTOCOLS[protocol]).OTLPSpanExporter
    except ImportError as error:
        raise ImportError(f"OTLP's exporter is not installed ({error}); pip install 'raygym[otel]'") from error
