"""How fast a policy generates and is trained on a device of which two limits are known: arithmetic and memory.

The roofline model (Williams, Waterman and Patterson, CACM 52(4), 2009), with a share of each limit that is reached in
practice. What an engine's step computes and what it reads are added, which is slower than the larger of the two by at
most a factor of two: an estimate, which a measured profile (`benchmarks/calibrate_simulated.py`) replaces.
"""

from __future__ import annotations

from dataclasses import dataclass

from raygym.batching_config import BatchingConfig
from raygym.memory_estimate import EngineSetup
from raygym.model_flops import PEAK_TFLOPS
from raygym.model_shape import ModelShape

_BLOCK = 256
"""Tokens of a simulated KV block; vLLM's are smaller, which matters to what prefixes share only."""


@dataclass(frozen=True, slots=True)
class Device:
    """What one GPU, or the cores that an actor has, can do. Shares are assumed, not measured."""

    name: str
    flops: float
    """Floating-point operations a second, in the policy's dtype, without sparsity."""
    bytes_per_s: float
    """Of its memory."""
    bandwidth_share: float
    """Reached while tokens are generated."""
    prefill_share: float
    """Of `flops`, reached while prompts are computed."""
    training_share: float
    """Of `flops`, reached by a learner, what it computes a second time included: `learn/mfu` is lower where it does."""
    step_overhead_s: float
    """Of an engine's step, whatever is in it."""
    all_reduce_s: float
    """Two of these a layer between tensor-parallel ranks."""


H100 = Device("H100 SXM", PEAK_TFLOPS["H100"] * 1e12, 3.35e12, 0.7, 0.5, 0.35, 2e-3, 15e-6)
"""The bandwidth is that of NVIDIA's data sheet."""


def cpu_device(cores: int) -> Device:
    """So many cores of a Xeon with AVX-512, in fp32: what one core did in `configs/simulated_smollm2_cpu.yaml`."""
    return Device(f"{cores} CPU core{'s' * (cores > 1)}", 128e9 * cores, 7.5e9, 1.0, 1.0, 1.0, 0.0, 0.0)


def engine_costs(setup: EngineSetup, device: Device, kv_bytes: int, chunked_prefill: bool = True) -> BatchingConfig:
    """What the steps of an engine cost.

    A step reads all weights once (with experts: all of them, which a batch of some size needs) and each request's KV
    cache, and computes 2 FLOPs for each active parameter and token (arXiv 2001.08361, section 2.1).

    Args:
        setup: the engine.
        device: one of its GPUs.
        kv_bytes: for its KV cache, on one GPU.
        chunked_prefill: as `BatchingConfig`'s.
    """
    shape, reached = setup.shape, device.bytes_per_s * device.bandwidth_share
    # Pipeline stages hold a part of the layers each but wait for one another.
    ranks = setup.tensor_parallel
    read = shape.parameters - (0 if shape.tied else shape.vocab * shape.hidden)
    read_s = setup.bytes_per_value * read / ranks / reached
    token_s = 2 * shape.matrix_parameters / ranks / (device.flops * device.prefill_share)
    blocks = kv_bytes // (setup.kv_bytes_per_token * _BLOCK)
    return BatchingConfig(
        step_s=device.step_overhead_s + read_s + (2 * shape.layers * device.all_reduce_s if ranks > 1 else 0),
        request_s=token_s,
        kv_token_s=setup.kv_bytes_per_token * setup.pipeline_parallel / reached,
        prefill_token_s=token_s,
        max_num_seqs=setup.max_num_seqs,
        max_num_batched_tokens=max(setup.max_num_batched_tokens, setup.max_num_seqs),
        chunked_prefill=chunked_prefill,
        kv_blocks=max(blocks, -(-setup.max_model_len // _BLOCK)),
        block_size=_BLOCK,
    )


def training_flops(shape: ModelShape, tokens: int, *, recompute: bool = False, more_forwards: int = 0) -> float:
    """FLOPs of one sequence's forward and backward pass.

    6 for each active parameter and token, and those of causal attention (arXiv 2204.02311, appendix B, halved for the
    mask). Recomputed activations are a forward pass more, so 8 in place of 6.

    Args:
        shape: the policy's.
        tokens: of the sequence.
        recompute: `learner.gradient_checkpointing`.
        more_forwards: without a backward pass, such as a reference policy's.
    """
    attention = 2 * shape.layers * shape.query_size * tokens
    forward = tokens * (2 * shape.matrix_parameters + attention)
    return float(forward * (3 + recompute + more_forwards))
