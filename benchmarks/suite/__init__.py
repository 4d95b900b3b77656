"""All benchmarks as one command: `python benchmarks/suite`, which `make bench` runs."""
