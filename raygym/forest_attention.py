"""Attention of a row of tokens that is a `PrefixForest`: each token sees its own node up to itself, and those above.

Three ways with one result. `cascade` makes one call of a fused kernel for each node (causal) and one for all that
continues it (everything sees everything), and merges their results by their log-sum-exp, as in ring attention
(arXiv 2310.01889) and cascade inference (arXiv 2501.01005, section 3.1.2): nothing is computed that a mask would hide,
and no key is copied. It needs a kernel that tells the log-sum-exp, here PyTorch's for CPUs. `flex` is FlexAttention
with a block mask, for GPUs. `dense` has a mask of T x T, for whatever the two cannot do, such as sliding windows.

Legend: H query heads, K key heads, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
    block_masks: list[Any] = field(default_factory=list, compare=False, repr=False)
    """FlexAttention's mask, once it was needed: all layers have the same."""

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
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    if kinds and sliding_window is None and (kind := kinds[module.layer_idx]) != "full_attention":
        asked.append(kind)  # what only a mask would tell; there is none
    if asked or dropout or attention_mask is not None:
        raise NotImplementedError(f"forest attention has no {', '.join(asked) or 'dropout or mask'}")
    scale = scaling if scaling is not None else query_1HTD.shape[-1] ** -0.5
    states = (query_1HTD, key_1KTD, value_1KTD)
    length = forest.length if forest else query_1HTD.shape[2]
    if sliding_window is not None and length > sliding_window:
        out_1HTD = dense(*states, forest or _one_sequence(length, query_1HTD.device), scale, sliding_window)
    elif forest is None:
        out_1HTD = scaled_dot_product_attention(*states, is_causal=True, scale=scale, enable_gqa=True)
    else:
        out_1HTD = (cascade if query_1HTD.device.type == "cpu" else flex)(*states, forest, scale)
    return out_1HTD.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, forest_attention)


def dense(
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
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
    return scaled_dot_product_attention(
        query_1HTD, key_1KTD, value_1KTD, attn_mask=seen_TT, scale=scale, enable_gqa=True
    )


def flex(query_1HTD: Tensor, key_1KTD: Tensor, value_1KTD: Tensor, forest: ForestLayout, scale: float) -> Tensor:
    """With FlexAttention, which skips blocks of tokens that do not see each other."""
    attend, block_mask = _flex(query_1HTD.device.type)
    ends_T = forest.subtree_end_T

    def seen(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < ends_T[k])

    length = query_1HTD.shape[2]
    if not forest.block_masks:
        forest.block_masks.append(block_mask(seen, None, None, length, length, device=query_1HTD.device))
    mask = forest.block_masks[0]
    out: Tensor = attend(query_1HTD, key_1KTD, value_1KTD, block_mask=mask, scale=scale, enable_gqa=True)
    return out


@cache
def _flex(device: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Without compilation it is exact, but keeps all T x T scores.
    attend: Any = torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention
    return attend, create_block_mask


def cascade(query_1HTD: Tensor, key_1KTD: Tensor, value_1KTD: Tensor, forest: ForestLayout, scale: float) -> Tensor:
    """With a fused kernel for each node and for what continues it."""
    # Query heads of one key head become heads of one batch entry, so that keys are seen by all without a copy.
    query_KGTD = query_1HTD[0].unflatten(0, (key_1KTD.shape[1], -1))
    out_KGTD: Tensor = _Cascade.apply(query_KGTD, key_1KTD[0], value_1KTD[0], forest.nodes, scale)  # type: ignore[no-untyped-call]
    return out_KGTD.flatten(0, 1)[None]


class _Cascade(torch.autograd.Function):
    """Backward: a kernel's backward needs of its forward only the output and the log-sum-exp, by which it normalises.
    Given those of all parts together, it gives this part's share of the gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, nodes: tuple[Node, ...], scale: float) -> Tensor:
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for queries, keys in _parts(nodes):
            causal = queries == keys
            seen = (_for_each_head(states[:, keys], query.shape[1]) for states in (key, value))
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, queries], *seen, 0.0, causal, scale=scale
            )
            if causal:
                out[:, :, queries], lse[:, :, queries] = part, part_lse
                continue
            before, after = lse[:, :, queries], torch.logaddexp(lse[:, :, queries], part_lse)
            out[:, :, queries] *= (before - after).exp_().to(part.dtype)[..., None]
            out[:, :, queries].addcmul_(part, (part_lse - after).exp_().to(part.dtype)[..., None])
            lse[:, :, queries] = after
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.nodes, ctx.scale = nodes, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (grad,) = grads
        query, key, value, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for queries, keys in _parts(ctx.nodes):
            causal = queries == keys
            seen = (_for_each_head(states[:, keys], query.shape[1]) for states in (key, value))
            part_dq, part_dk, part_dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(grad[:, :, queries], query[:, :, queries], *seen, out[:, :, queries], lse[:, :, queries]),
                0.0,
                causal,
                scale=ctx.scale,
            )
            if causal:
                dq[:, :, queries] = part_dq
                torch.sum(part_dk, 1, out=dk[:, keys])
                torch.sum(part_dv, 1, out=dv[:, keys])
            else:
                dq[:, :, queries] += part_dq
                dk[:, keys] += part_dk.sum(1)
                dv[:, keys] += part_dv.sum(1)
        return dq, dk, dv, None, None


def _parts(nodes: tuple[Node, ...]) -> Iterator[tuple[slice, slice]]:
    """Queries and keys of each kernel call. First, for each token once, those of its own node."""
    for node in nodes:
        yield slice(node.start, node.end), slice(node.start, node.end)
    for node in nodes:
        if node.subtree_end > node.end:
            yield slice(node.end, node.subtree_end), slice(node.start, node.end)


def _for_each_head(states_KTD: Tensor, heads: int) -> Tensor:
    return states_KTD[:, None].expand(-1, heads, -1, -1)


def _one_sequence(length: int, device: torch.device) -> ForestLayout:
    positions_T = torch.arange(length, device=device)
    return ForestLayout((Node(0, length, length),), torch.full_like(positions_T, length), positions_T, length)
