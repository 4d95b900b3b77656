"""Who else gets the numbers of metrics.jsonl: Weights & Biases, MLflow, Prometheus, OpenTelemetry."""
