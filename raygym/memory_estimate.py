"""What the parts of a run need of a GPU's memory, or of a machine's where there are none, before anything runs.

A learner's states follow ZeRO (arXiv 1910.02054, section 3.1 and figure 1): with P parameters in bf16, mixed-precision
Adam keeps 2 P of weights, 2 P of gradients and K P = 12 P of optimizer states (fp32 weights and two moments). Stage 1
shares the last among the ranks, stage 2 the gradients too, stage 3 all three. Before that, each rank loads the whole
policy, in stage 3 as well. Activations are counted as in arXiv
2205.05198 (section 4.1): all that the backward pass reads, layer by layer; with recomputation only what goes into each
layer, and one layer's at a time. That paper's 34 bytes a token and hidden unit are GPT's; ours are those of the models
in `model_shape.py` as Transformers computes them, and `test_memory_estimate` measures them.

An engine's KV cache is what `gpu_memory_utilization` leaves of the GPU, as in vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

from raygym.logit_chunk import CHUNK_LOGITS
from raygym.model_shape import ModelShape

GIB = 2**30
_FP32 = 4
_LOGIT_BLOCK_BYTES = 2**28
CONTEXT_BYTES = int(1.5 * GIB)
"""Assumed for each process on a GPU: CUDA's context, NCCL's buffers, the libraries' workspaces."""
USABLE_SHARE = 0.95
"""Assumed of a learner's GPU: the rest is lost to fragmentation."""
CUDA_GRAPH_BYTES = GIB
"""Assumed for an engine's captured CUDA graphs."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device, by what they are for."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    kv_cache: int = 0
    buffers: int = 0
    """Communication, CUDA's context, a step's temporary copies."""
    host: int = 0
    """In the machine's own memory instead, by offload; not part of the total."""
    start: int = 0
    """All that is on the device when a learner has loaded the policy and shares nothing yet; not part of the total."""
    start_host: int = 0
    """In the machine's own memory, through which a learner on a GPU loads the policy."""

    @property
    def total(self) -> int:
        """On the device, after the start."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.kv_cache + self.buffers

    @property
    def peak(self) -> int:
        """On the device, at the start or after it."""
        return max(self.start, self.total)


@dataclass(frozen=True, slots=True)
class LearnerSetup:
    """What a learner's memory depends on."""

    shape: ModelShape
    ranks: int
    zero_stage: int
    bytes_per_value: int
    """Of weights and activations: 4 in fp32, 2 in bf16."""
    tokens_per_micro_batch: int
    longest_sequence: int
    """Tokens; one that is longer than a micro-batch gets one for itself."""
    trained_parameters: int | None = None
    """None: all."""
    gradient_checkpointing: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    reference: bool = False
    """A frozen copy of the policy is kept beside it, whole on each rank."""
    bucket_values: int = 500_000_000
    """DeepSpeed's `reduce_bucket_size`."""
    live_values: int = 1_000_000_000
    """DeepSpeed's `stage3_max_live_parameters`."""
    gpu: bool = True

    @property
    def micro_batch_tokens(self) -> int:
        """Of the largest micro-batch."""
        return max(self.tokens_per_micro_batch, self.longest_sequence)


def estimate_learner(setup: LearnerSetup) -> Memory:
    """One rank's memory: in the backward pass or the optimizer's step, whichever needs more, and at the start."""
    shape, ranks, stage = setup.shape, setup.ranks, setup.zero_stage
    parameters, trained = shape.parameters, shape.parameters
    if setup.trained_parameters is not None:
        trained = setup.trained_parameters
        parameters += trained
    weights = setup.bytes_per_value * (_share(parameters, ranks) if stage == 3 else parameters)
    gradients = setup.bytes_per_value * (_share(trained, ranks) if stage >= 2 else trained)
    # In fp32 the weights are their own master copy, but stages 1 and 2 keep a rank's share of them once more.
    has_master = setup.bytes_per_value < _FP32 or stage in (1, 2)
    owned = _share(trained, ranks) if stage >= 1 else trained
    optimizer = _FP32 * owned * (3 if has_master else 2)
    on_host = (optimizer if setup.offload_optimizer else 0) + (weights if setup.offload_parameters else 0)
    if setup.offload_optimizer and stage >= 2:
        on_host += gradients  # go there as soon as they are reduced
    # The step turns its share of the gradients into fp32; activations are gone by then.
    step = 0 if setup.bytes_per_value == _FP32 or setup.offload_optimizer else _FP32 * owned
    return Memory(
        weights=(0 if setup.offload_parameters else weights)
        + setup.reference * shape.parameters * setup.bytes_per_value,
        gradients=0 if setup.offload_optimizer and stage >= 2 else gradients,
        optimizer=0 if setup.offload_optimizer else optimizer,
        activations=max(step, _activations(setup)),
        buffers=_buffers(setup, trained) + setup.gpu * CONTEXT_BYTES,
        host=on_host,
        start=setup.bytes_per_value * parameters + setup.gpu * CONTEXT_BYTES,
        start_host=setup.gpu * setup.bytes_per_value * shape.parameters,
    )


def activation_bytes_per_token(shape: ModelShape, bytes_per_value: int) -> int:
    """What one layer keeps of a token for its backward pass, with an attention that keeps no scores.

    A norm keeps its input in fp32, what it made of it, and the product with its weight. Attention keeps its rotated
    queries and keys, the values, its output and a log-sum-exp for each head. The gated MLP keeps the gate before and
    after its activation, the other half, and their product.
    """
    value = bytes_per_value
    norms = 2 * shape.hidden * (_FP32 + 2 * value)
    if shape.qk_norm:
        norms += (shape.query_size + shape.kv_size) * (_FP32 + value)
    attention = value * (2 * shape.query_size + 2 * shape.kv_size) + _FP32 * shape.heads
    mlp = 4 * value * shape.intermediate
    if shape.experts and shape.dense_layers < shape.layers:
        # Each of a token's experts gets a copy of it, and returns a result that is weighted.
        each = value * (4 * shape.expert_intermediate + 3 * shape.hidden)
        mlp = shape.experts_per_token * each + 2 * _FP32 * shape.experts
    return norms + attention + mlp


def _activations(setup: LearnerSetup) -> int:
    shape, tokens, value = setup.shape, setup.micro_batch_tokens, setup.bytes_per_value
    layer = activation_bytes_per_token(shape, value)
    kept = shape.layers * shape.hidden * value + layer if setup.gradient_checkpointing else shape.layers * layer
    # One chunk of logits, whose gradient takes its place, and blocks of them in fp32 (`token_logprobs.py`). Of the
    # final hidden states: themselves, those of trained tokens, and their gradient.
    logits = min(tokens * shape.vocab, CHUNK_LOGITS)
    blocks = 3 * min(_FP32 * logits, _LOGIT_BLOCK_BYTES)
    return tokens * (kept + 3 * shape.hidden * value) + logits * value + blocks


def _buffers(setup: LearnerSetup, trained: int) -> int:
    value = setup.bytes_per_value
    if setup.ranks == 1 and setup.zero_stage < 3:
        return 0
    # Two of them, so that one can be filled while the other is on its way.
    buckets = 2 * value * min(setup.bucket_values, trained)
    gathered = max(min(setup.live_values, setup.shape.parameters), setup.shape.largest_layer_parameters)
    return buckets + (value * gathered if setup.zero_stage == 3 else 0)


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """What an engine's memory depends on. Names are vLLM's where it has one."""

    shape: ModelShape
    bytes_per_value: int
    max_model_len: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    kv_bytes_per_value: int | None = None
    """None: as the weights."""
    gpu_memory_utilization: float = 0.92
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 128
    enforce_eager: bool = False
    kv_cache_bytes: int | None = None
    """Given instead of what is left of a GPU, as on CPU."""

    @property
    def gpus(self) -> int:
        """That share one engine's layers."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def kv_bytes_per_token(self) -> int:
        """On one GPU. A key head is copied where there are more GPUs than heads."""
        layers = _share(self.shape.layers, self.pipeline_parallel)
        heads = _share(self.shape.kv_heads, self.tensor_parallel)
        return 2 * layers * heads * self.shape.head_size * (self.kv_bytes_per_value or self.bytes_per_value)


def estimate_engine(setup: EngineSetup, device_bytes: int) -> Memory:
    """One of an engine's GPUs. `kv_cache` is what is left for it, and is 0 or less where nothing is."""
    shape = setup.shape
    weights = setup.bytes_per_value * _share(shape.parameters, setup.gpus)
    activations = _engine_activations(setup)
    if setup.kv_cache_bytes is not None:
        return Memory(weights=weights, activations=activations, kv_cache=setup.kv_cache_bytes)
    allowed = int(setup.gpu_memory_utilization * device_bytes)
    buffers = CONTEXT_BYTES + (0 if setup.enforce_eager else CUDA_GRAPH_BYTES)
    return Memory(
        weights=weights,
        activations=activations,
        kv_cache=allowed - weights - activations - buffers,
        buffers=buffers,
    )


def _engine_activations(setup: EngineSetup) -> int:
    """At the peak of a full batch: a layer's input and output, its widest inner states; or the logits."""
    shape, value = setup.shape, setup.bytes_per_value
    width = shape.experts_per_token * shape.expert_intermediate if shape.experts else shape.intermediate
    inner = max(shape.query_size + 2 * shape.kv_size, 3 * width)
    layer = setup.max_num_batched_tokens * value * (4 * shape.hidden + _share(inner, setup.tensor_parallel))
    logits = setup.max_num_seqs * shape.vocab * 2 * _FP32
    return max(layer, logits)


def _share(count: int, parts: int) -> int:
    return -(-count // parts)
