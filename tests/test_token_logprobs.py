"""Logprobs and entropies from logits, against PyTorch's own operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raygym import token_logprobs as module
from raygym.token_logprobs import token_logprobs


def plain(logits_CV: Tensor, target_ids_C: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p_CV = (logits_CV.double() / temperature).log_softmax(-1)
    return log_p_CV.gather(-1, target_ids_C[:, None])[:, 0], -(log_p_CV.exp() * log_p_CV).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize("block_bytes", [1, 2000, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", ["logprobs", "entropies", "both"])
def test_values_and_gradients_are_those_of_the_plain_formula(
    temperature: float, block_bytes: int, dtype: torch.dtype, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module._BLOCK_BYTES, "cpu", block_bytes)
    torch.manual_seed(0)
    start_CV, targets_C, weights_2C = torch.randn(23, 91) * 4, torch.randint(0, 91, (23,)), torch.randn(2, 23)
    results = []
    for function in (token_logprobs, plain):
        leaf_CV = start_CV.to(dtype).requires_grad_()
        logprobs_C, entropies_C = function(leaf_CV.clone(), targets_C, temperature)
        parts = {"logprobs": (logprobs_C * weights_2C[0]).sum(), "entropies": (entropies_C * weights_2C[1]).sum()}
        (sum(parts.values()) if used == "both" else parts[used]).backward()
        results.append((logprobs_C.detach(), entropies_C.detach(), leaf_CV.grad))
    for found, expected in zip(*results, strict=True):
        assert found is not None and expected is not None
        tolerance = 1e-5 if found.dtype == torch.float32 else 8e-3  # logits are up to 27
        torch.testing.assert_close(found.double(), expected.double(), atol=tolerance, rtol=tolerance)


def test_an_impossible_token_has_no_part_in_the_entropy() -> None:
    logits_CV = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    logprobs_C, entropies_C = token_logprobs(logits_CV.clone(), torch.tensor([1]), 1.0)
    torch.testing.assert_close(entropies_C, torch.tensor([2.0]).log())
    (logprobs_C + entropies_C).sum().backward()
    torch.testing.assert_close(logits_CV.grad, torch.tensor([[-0.5, 0.5, 0.0]]))


def test_a_second_backward_pass_is_refused() -> None:
    logits_CV = torch.randn(2, 5, requires_grad=True)
    logprobs_C, _ = token_logprobs(logits_CV.clone(), torch.tensor([1, 2]), 1.0)
    logprobs_C.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        logprobs_C.sum().backward()
