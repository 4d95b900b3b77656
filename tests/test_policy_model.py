import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_packing import make_sequence
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from raygym.config import LearnerConfig
from raygym.forest_attention import forest_attention
from raygym.forest_packing import pack_forest
from raygym.models import resolve_policy
from raygym.packing import MicroBatch, pack
from raygym.policy_model import TokenLogprobs
from raygym.policy_packing import FOREST, ROWS, Packing, choose_packing
from raygym.types import TrainSequence
from raygym.update import PolicyUpdate

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(resolve_policy("tiny"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def capped() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        final_logit_softcapping=5.0,
        sliding_window=8,
        initializer_range=0.3,
    )
    return Gemma2ForCausalLM(config).eval()


def one_by_one(model: torch.nn.Module, sequences: list[TrainSequence], temperature: float = TEMPERATURE) -> np.ndarray:
    """The trained tokens' logprobs from the model's own forward, a sequence at a time."""
    found = []
    for sequence in sequences:
        ids = torch.tensor(sequence.token_ids, dtype=torch.long)
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0].float() / temperature, -1)
        trained = np.flatnonzero(sequence.loss_mask)
        found.append(logprobs[trained - 1, ids[trained]].numpy())
    return np.concatenate(found)


SEQUENCES = [make_sequence(length, seed) for seed, length in enumerate([40, 9, 25, 3, 1, 31, 17, 40, 2])]


@pytest.mark.parametrize("name", ["tiny", "capped"])
@pytest.mark.parametrize("chunk_logits", [2**26, 259 * 5])
def test_packed_logprobs_equal_those_of_each_sequence_alone(
    name: str, chunk_logits: int, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    batch = pack(SEQUENCES)
    assert (batch.position_ids_BL[:, 1:] == 0).any(), "no row holds two sequences: nothing is tested"
    logprobs, entropies = TokenLogprobs(model, chunk_logits)(batch, TEMPERATURE)
    np.testing.assert_allclose(logprobs.detach(), one_by_one(model, SEQUENCES), atol=1e-5)
    assert ((entropies > 0) & (entropies <= np.log(259) + 1e-5)).all()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_packed_logprobs_equal_those_of_each_sequence_alone_on_smollm2() -> None:
    model = AutoModelForCausalLM.from_pretrained(resolve_policy("smollm2-135m-instruct"), dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs, _ = TokenLogprobs(model)(pack(SEQUENCES), TEMPERATURE)
    # Rounding: 4.3e-5 in fp32, while the same comparison in fp64 gave 1.4e-14.
    np.testing.assert_allclose(logprobs, one_by_one(model, SEQUENCES), atol=5e-5)


def test_chunks_give_the_same_gradients(tiny: LlamaForCausalLM) -> None:
    gradients = []
    for chunk_logits in (2**26, 259 * 4):
        tiny.zero_grad()
        logprobs, _ = TokenLogprobs(tiny, chunk_logits)(pack(SEQUENCES), TEMPERATURE)
        logprobs.sum().backward()
        gradients.append([p.grad.clone() for p in tiny.parameters()])
    tiny.zero_grad()
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, chunked, atol=1e-3, rtol=1e-4)


def test_an_empty_batch_runs_through_every_parameter(tiny: LlamaForCausalLM) -> None:
    tiny.zero_grad()
    batch = pack([])
    logprobs, _ = TokenLogprobs(tiny)(batch, TEMPERATURE)
    (logprobs * batch.mask_N).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in tiny.parameters())
    tiny.zero_grad()


def in_groups() -> list[TrainSequence]:
    """Two prompts, each with three answers, and one sequence by itself."""
    rng, made = np.random.default_rng(3), [make_sequence(40, 0)]
    for length in (60, 33):
        prompt = rng.integers(3, 250, length, dtype=np.int32)
        for answer in (5, 21, 40):
            ids = np.concatenate([prompt, rng.integers(3, 250, answer, dtype=np.int32)])
            mask = np.arange(len(ids)) >= length
            logprobs = np.where(mask, -rng.random(len(ids)), 0).astype(np.float32)
            made.append(TrainSequence.uniform(ids, mask, logprobs, float(rng.normal())))
    return made


@pytest.fixture(params=["llama", "qwen2", "qwen3", "mistral", "qwen3_moe"])
def family(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.3,
        # What a window is set to for longer sequences has to be kept.
        **({"sliding_window": 24} if request.param == "mistral" else {}),
        **(
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            if request.param == "qwen3_moe"
            else {}
        ),
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **shape), dtype=torch.float32).eval()


def test_a_shared_prompt_changes_neither_logprobs_nor_gradients(family: Any) -> None:
    sequences = in_groups()
    plain = copy.deepcopy(family)
    model = TokenLogprobs(family)
    assert choose_packing(model, "auto") is FOREST
    batch = pack_forest(sequences)
    assert batch.num_computed == batch.num_tokens - 2 * (60 + 33)
    results = []
    for logprobs_N in (
        model(batch, TEMPERATURE)[0],
        torch.cat([TokenLogprobs(plain)(pack([sequence]), TEMPERATURE)[0] for sequence in sequences]),
    ):
        (logprobs_N * batch.advantages_N).sum().backward()
        results.append(logprobs_N.detach())
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    for (name, found), expected in zip(family.named_parameters(), plain.parameters(), strict=True):
        assert found.grad is not None and expected.grad is not None
        scale = expected.grad.abs().max().item()
        assert (found.grad - expected.grad).abs().max().item() <= 1e-5 * max(1.0, scale), name


def test_rows_are_taken_where_a_forest_is_not_exact(capped: Gemma2ForCausalLM) -> None:
    before = capped.config._attn_implementation
    assert choose_packing(TokenLogprobs(capped), "auto") is ROWS
    assert capped.config._attn_implementation == before
    with pytest.raises(ValueError, match=r"learner\.packing: forest: gemma2 cannot"):
        choose_packing(TokenLogprobs(capped), "forest")


def test_rows_can_be_asked_for(tiny: LlamaForCausalLM) -> None:
    assert choose_packing(TokenLogprobs(tiny), "rows") is ROWS


def test_logits_that_cannot_be_reproduced_are_refused(
    capped: Gemma2ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raygym.policy_model._SOFTCAPS", ())
    with pytest.raises(ValueError, match="gemma2 gives other logprobs"):
        choose_packing(TokenLogprobs(capped), "auto")


@pytest.mark.parametrize("packing", [ROWS, FOREST], ids=["rows", "forest"])
def test_all_ranks_use_the_head_equally_often(tiny: LlamaForCausalLM, packing: Packing) -> None:
    """Under ZeRO-3 each use is a collective: one more on a rank would wait for ever."""
    policy = copy.deepcopy(tiny)
    choose_packing(TokenLogprobs(policy), packing.name)
    model, calls = TokenLogprobs(policy, chunk_logits=259 * 4), [0]
    policy.get_output_embeddings().register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    class Counting:
        def logprobs(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
            return model(batch, 1.0)

        def backward(self, loss: torch.Tensor, *, last: bool) -> None:
            loss.backward()

        def step(self, lr: float) -> float:
            return 0.0

    counts, found = [], {}
    sequences = [make_sequence(200, 0, trained=0.9), *(make_sequence(30, seed) for seed in range(1, 5))]
    for rank in range(3):
        config = LearnerConfig(tokens_per_micro_batch=220)
        update = PolicyUpdate(config, Counting(), 1.0, packing=packing, rank=rank, world_size=3)
        found |= update.token_logprobs(sequences)
        counts.append(calls[0])
        calls[0] = 0
    assert len(set(counts)) == 1 and counts[0] > 10, counts
    expected = [one_by_one(tiny, [sequence], 1.0) for sequence in sequences]
    for index, sequence in enumerate(sequences):
        np.testing.assert_allclose(found[index][sequence.loss_mask], expected[index], atol=1e-5)


@pytest.mark.parametrize("kind", ["chunked_attention", "sliding_attention"])
def test_what_only_a_mask_would_tell_is_refused(kind: str) -> None:
    module = SimpleNamespace(config=SimpleNamespace(layer_types=["full_attention", kind]), layer_idx=0)
    states = [torch.zeros(1, 2, 3, 8) for _ in range(3)]
    forest_attention(module, *states, None)
    module.layer_idx = 1
    with pytest.raises(NotImplementedError, match=kind):
        forest_attention(module, *states, None)
