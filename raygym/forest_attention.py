"""Attention of a row of tokens that is a `PrefixForest`: each token sees its own node up to itself, and those above.

Three ways with one result. `cascade` makes one call of a fused kernel for each node (causal) and one for all that
continues it (everything sees everything), and merges their results by their log-sum-exp, as in ring attention
(arXiv 2310.01889) and cascade inference (arXiv 2501.01005, section 3.1.2): nothing is computed that a mask would hide,
and no key is copied. It needs a kernel that tells the log-sum-exp, here PyTorch's for CPUs. `flex` is FlexAttention
with a block mask, for GPUs. `dense` has a mask of T x T, for whatever the two cannot do, such as sliding windows.

Legend: H query heads, K key heads, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from raygym.prefix_forest import Node

NAME = "raygym_forest"
"""Under which Transformers knows it: `policy.set_attn_implementation(NAME)`, then calls with `forest=`."""
# How models ask for what is not here: a cap on the scores, sinks, heads switched off, position biases.
_MISSING = ("softcap", "s_aux", "head_mask", "position_bias")


@dataclass(frozen=True, slots=True)
class ForestLayout:
    """What attention needs of a forest. `subtree_end_T[k]` is the end of what continues token k's node."""

    nodes: tuple[Node, ...]
    subtree_end_T: Tensor
    positions_T: Tensor
    length: int
    """Tokens of the longest sequence."""

    def to(self, device: torch.device) -> ForestLayout:
        """The same on another device."""
        return ForestLayout(self.nodes, self.subtree_end_T.to(device), self.positions_T.to(device), self.length)


def forest_attention(
    module: Any,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,
    *,
    forest: ForestLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface. Returns 1 x T x H x D, and no weights.

    Without `forest`, each row of the batch is one sequence.

    Raises:
        NotImplementedError: the model asks for something that would be left out silently.
    """
    asked = [name for name in _MISSING if kwargs.get(name) is not None]
    if asked or dropout or attention_mask is not None:
        raise NotImplementedError(f"forest attention has no {', '.join(asked) or 'dropout or mask'}")
    groups = query_1HTD.shape[1] // key_1KTD.shape[1]
    key_1HTD, value_1HTD = (_repeated(states, groups) for states in (key_1KTD, value_1KTD))
    scale = scaling if scaling is not None else query_1HTD.shape[-1] ** -0.5
    states = (query_1HTD, key_1HTD, value_1HTD)
    length = forest.length if forest else query_1HTD.shape[2]
    if sliding_window is not None and length > sliding_window:
        out_1HTD = dense(*states, forest or _one_sequence(length, query_1HTD.device), scale, sliding_window)
    elif forest is None:
        out_1HTD = scaled_dot_product_attention(*states, is_causal=True, scale=scale)
    else:
        out_1HTD = (cascade if query_1HTD.device.type == "cpu" else flex)(*states, forest, scale)
    return out_1HTD.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, forest_attention)


def dense(
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    forest: ForestLayout,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """With a mask of T x T. With a window, a token sees only the `sliding_window` last positions, its own included."""
    places_T = torch.arange(query_1HTD.shape[2], device=query_1HTD.device)
    q_T1, k_1T = places_T[:, None], places_T[None]
    seen_TT = (k_1T <= q_T1) & (q_T1 < forest.subtree_end_T[None])
    if sliding_window is not None:
        seen_TT &= forest.positions_T[:, None] - forest.positions_T[None] < sliding_window
    return scaled_dot_product_attention(query_1HTD, key_1HTD, value_1HTD, attn_mask=seen_TT, scale=scale)


def flex(query_1HTD: Tensor, key_1HTD: Tensor, value_1HTD: Tensor, forest: ForestLayout, scale: float) -> Tensor:
    """With FlexAttention, which skips blocks of tokens that do not see each other."""
    attend, block_mask = _flex(query_1HTD.device.type)
    ends_T = forest.subtree_end_T

    def seen(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < ends_T[k])

    length = query_1HTD.shape[2]
    mask = block_mask(seen, None, None, length, length, device=query_1HTD.device)
    out: Tensor = attend(query_1HTD, key_1HTD, value_1HTD, block_mask=mask, scale=scale)
    return out


@cache
def _flex(device: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Without compilation it is exact, but keeps all T x T scores.
    attend: Any = torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention
    return attend, create_block_mask


def cascade(query_1HTD: Tensor, key_1HTD: Tensor, value_1HTD: Tensor, forest: ForestLayout, scale: float) -> Tensor:
    """With a fused kernel for each node and for what continues it."""
    out: Tensor = _Cascade.apply(query_1HTD, key_1HTD, value_1HTD, forest.nodes, scale)  # type: ignore[no-untyped-call]
    return out


class _Cascade(torch.autograd.Function):
    """Backward: a kernel's backward needs of its forward only the output and the log-sum-exp, by which it normalises.
    Given those of all parts together, it gives this part's share of the gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, nodes: tuple[Node, ...], scale: float) -> Tensor:
        out_1HTD = torch.empty_like(query)
        lse_1HT = torch.empty(query.shape[:3], dtype=torch.float32)
        for node in nodes:
            own = slice(node.start, node.end)
            out_1HTD[:, :, own], lse_1HT[:, :, own] = _attend(query, key, value, own, own, scale, causal=True)
        for node in nodes:
            if node.subtree_end > node.end:
                own, below = slice(node.start, node.end), slice(node.end, node.subtree_end)
                part, part_lse = _attend(query, key, value, below, own, scale, causal=False)
                before = lse_1HT[:, :, below]
                lse = torch.logaddexp(before, part_lse)
                out_1HTD[:, :, below] *= (before - lse).exp().to(part.dtype)[..., None]
                out_1HTD[:, :, below] += part * (part_lse - lse).exp().to(part.dtype)[..., None]
                lse_1HT[:, :, below] = lse
        ctx.save_for_backward(query, key, value, out_1HTD, lse_1HT)
        ctx.nodes, ctx.scale = nodes, scale
        return out_1HTD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (grad_1HTD,) = grads
        query, key, value, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for node in ctx.nodes:
            own = slice(node.start, node.end)
            parts = [(own, True)]
            if node.subtree_end > node.end:
                parts.append((slice(node.end, node.subtree_end), False))
            for queries, causal in parts:
                part_dq, part_dk, part_dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad_1HTD[:, :, queries],
                    query[:, :, queries],
                    key[:, :, own],
                    value[:, :, own],
                    out[:, :, queries],
                    lse[:, :, queries],
                    0.0,
                    causal,
                    scale=ctx.scale,
                )
                dq[:, :, queries] += part_dq
                dk[:, :, own] += part_dk
                dv[:, :, own] += part_dv
        return dq, dk, dv, None, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, queries: slice, keys: slice, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of the scores, 1 x H x length."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[:, :, queries], key[:, :, keys], value[:, :, keys], 0.0, causal, scale=scale
    )
    return out, lse


def _one_sequence(length: int, device: torch.device) -> ForestLayout:
    positions_T = torch.arange(length, device=device)
    return ForestLayout((Node(0, length, length),), torch.full_like(positions_T, length), positions_T, length)


def _repeated(states_1KTD: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return states_1KTD
    batch, heads, length, size = states_1KTD.shape
    expanded = states_1KTD[:, :, None].expand(batch, heads, groups, length, size)
    return expanded.reshape(batch, heads * groups, length, size)
