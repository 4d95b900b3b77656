"""raygym: reinforcement learning of language-model agents on a Ray cluster."""

__version__ = "0.1.0"
