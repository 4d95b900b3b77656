"""How many logits are kept at a time; here, so that whoever estimates memory need not import torch."""

CHUNK_LOGITS = 2**26
"""Tokens x vocabulary."""
