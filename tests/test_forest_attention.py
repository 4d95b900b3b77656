"""Attention over a forest, by each of its ways, against each sequence by itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from raygym.forest_attention import ForestLayout, cascade, dense, flex, forest_attention
from raygym.forest_packing import forest_layout
from raygym.prefix_forest import PrefixForest, build_forest

HEADS, SIZE, SCALE = 4, 16, 0.3


def some_forest(seed: int = 0) -> PrefixForest:
    """Three levels, a sequence that is another's beginning, two equal ones, and one that shares nothing."""
    rng = np.random.default_rng(seed)

    def new(length: int) -> np.ndarray:
        return rng.integers(0, 1000, length).astype(np.int32)

    system = new(30)
    prompts = [np.concatenate([system, new(40)]), np.concatenate([system, new(17)])]
    sequences = [np.concatenate([prompt, new(n)]) for prompt in prompts for n in (1, 20, 33)]
    return build_forest([*sequences, prompts[0], sequences[1], new(25), new(1)])


def layout_of(forest: PrefixForest) -> ForestLayout:
    return forest_layout(forest)


def states(length: int, *, grad: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(length)
    query, key, value, weights = (torch.randn(1, HEADS, length, SIZE) for _ in range(4))
    return query.requires_grad_(grad), key.requires_grad_(grad), value.requires_grad_(grad), weights


def one_by_one(forest: PrefixForest, query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
    rows: dict[int, Tensor] = {}
    for places in forest.places:
        at = torch.from_numpy(places).long()
        q, k, v = (states[:, :, at] for states in (query, key, value))
        apart = torch.arange(len(at))[:, None] - torch.arange(len(at))[None]
        seen = (apart >= 0) & (apart < (window or len(at)))
        out = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=SCALE)
        rows |= {int(place): out[:, :, index] for index, place in enumerate(at)}
    return torch.stack([rows[place] for place in range(len(rows))], dim=2)


@pytest.mark.parametrize("attend", [cascade, dense])
@pytest.mark.parametrize("seed", range(3))
def test_outputs_and_gradients_are_those_of_each_sequence_alone(attend: Callable[..., Tensor], seed: int) -> None:
    forest = some_forest(seed)
    query, key, value, weights = states(len(forest.token_ids_T))
    results = []
    for out in (
        attend(query, key, value, layout_of(forest), SCALE),
        one_by_one(forest, query, key, value),
    ):
        results.append([out.detach(), *torch.autograd.grad((out * weights).sum(), (query, key, value))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_flex_gives_the_same() -> None:
    """On a CPU it has no gradient, so that part of it is not tested here."""
    forest = some_forest()
    query, key, value, _ = states(len(forest.token_ids_T), grad=False)
    found = flex(query, key, value, layout_of(forest), SCALE)
    torch.testing.assert_close(found, one_by_one(forest, query, key, value), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 7, 50, 1000])
def test_a_window_ends_where_the_sequences_own_positions_say(window: int) -> None:
    forest = some_forest()
    query, key, value, _ = states(len(forest.token_ids_T), grad=False)
    found, _ = forest_attention(
        None, query, key, value, None, forest=layout_of(forest), scaling=SCALE, sliding_window=window
    )
    expected = one_by_one(forest, query, key, value, window).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_grouped_queries_see_their_own_key_head() -> None:
    forest = some_forest()
    query, key, value, _ = states(len(forest.token_ids_T), grad=False)
    found, _ = forest_attention(None, query, key[:, :2], value[:, :2], None, forest=layout_of(forest), scaling=SCALE)
    repeated = [each[:, :2].repeat_interleave(2, dim=1) for each in (key, value)]
    torch.testing.assert_close(found, one_by_one(forest, query, *repeated).transpose(1, 2), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("asked", [{"softcap": 50.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}])
def test_what_it_cannot_do_is_refused(asked: dict[str, object]) -> None:
    forest = some_forest()
    query, key, value, _ = states(len(forest.token_ids_T), grad=False)
    with pytest.raises(NotImplementedError):
        forest_attention(None, query, key, value, None, forest=layout_of(forest), scaling=SCALE, **asked)  # type: ignore[arg-type]
