import numpy as np
import pytest
import torch
from test_packing import make_sequence
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from raygym.models import resolve_policy
from raygym.packing import pack, packed_order
from raygym.policy_model import TokenLogprobs, check_model
from raygym.types import TrainSequence

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


def one_by_one(model: torch.nn.Module, sequences: list[TrainSequence]) -> np.ndarray:
    """The trained tokens' logprobs from the model's own forward, a sequence at a time, in packed order."""
    found = []
    for sequence in (sequences[index] for index in packed_order(sequences)):
        ids = torch.tensor(sequence.token_ids, dtype=torch.long)
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0].float() / TEMPERATURE, -1)
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
    assert not entropies.requires_grad
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


def test_check_accepts_what_is_exact(tiny: LlamaForCausalLM, capped: Gemma2ForCausalLM) -> None:
    check_model(TokenLogprobs(tiny))
    check_model(TokenLogprobs(capped))


def test_check_refuses_logits_that_it_cannot_reproduce(
    capped: Gemma2ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raygym.policy_model._SOFTCAPS", ())
    with pytest.raises(ValueError, match="gemma2 gives other logprobs"):
        check_model(TokenLogprobs(capped))
