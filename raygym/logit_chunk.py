"""How many logits are kept at a time; here, so that whoever estimates memory need not import torch."""

CHUNK_LOGITS = 2**28
"""Tokens x vocabulary; 1 GiB in fp32. Nothing else of this size is kept with them."""
