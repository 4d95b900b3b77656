"""The KV cache of a simulated engine: how many blocks are in use, and which prefixes are still known."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from raygym.types import Int32Array

_TOKEN_BYTES = 4


def prefix_hashes(token_ids: Int32Array, block_size: int, known: Sequence[int] = ()) -> list[int]:
    """One hash for each full block of `token_ids`, which stands for all tokens up to the block's end.

    Args:
        token_ids: int32.
        block_size: tokens of a block.
        known: the hashes of its first blocks, where they were computed before.
    """
    hashes = list(known)
    data, width = token_ids[len(hashes) * block_size :].tobytes(), block_size * _TOKEN_BYTES
    last = hashes[-1] if hashes else 0
    for start in range(0, len(data) - width + 1, width):
        last = hash((last, data[start : start + width]))
        hashes.append(last)
    return hashes


class KvBlocks:
    """Blocks that running requests hold, shared ones counted once, and released ones that are kept until needed.

    A request holds blocks with a hash, which others can share, and blocks without one.
    """

    def __init__(self, blocks: int) -> None:
        """An empty cache of so many blocks."""
        self.blocks = blocks
        self.used = 0
        """Blocks that running requests hold."""
        self._holders: dict[int, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that can be taken, those with a released prefix in them included."""
        return self.blocks - self.used

    def known(self, hashes: Sequence[int]) -> int:
        """How many blocks from the first on are in the cache."""
        for count, block in enumerate(hashes):
            if block not in self._holders and block not in self._kept:
                return count
        return len(hashes)

    def cost(self, hashes: Sequence[int]) -> int:
        """How many of these known blocks nobody holds, so that sharing them takes from `available`."""
        return sum(block in self._kept for block in hashes)

    def share(self, hashes: Sequence[int]) -> None:
        """Hold known blocks, which somebody else may hold too."""
        for block in hashes:
            if block in self._kept:
                del self._kept[block]
                self.used += 1
            self._holders[block] = self._holders.get(block, 0) + 1

    def take(self, count: int) -> None:
        """Hold new blocks without a hash; released prefixes go, the longest unused first."""
        self.used += count
        assert self.used <= self.blocks, (self.used, self.blocks)
        for _ in range(len(self._kept) - self.available):
            self._kept.popitem(last=False)

    def name(self, hashes: Sequence[int]) -> list[int]:
        """Give held blocks their hashes. Returns those that were new: the caller holds these by their hash now."""
        new = [block for block in hashes if block not in self._holders and block not in self._kept]
        self._holders.update(dict.fromkeys(new, 1))
        return new

    def release(self, hashes: Sequence[int], unnamed: int) -> None:
        """Hold these no longer. A prefix that nobody holds is kept, its end to be given up before its beginning."""
        self.used -= unnamed
        for block in reversed(hashes):
            holders = self._holders[block] - 1
            if holders:
                self._holders[block] = holders
            else:
                del self._holders[block]
                self._kept[block] = None
                self.used -= 1

    def forget(self) -> None:
        """Drop all prefixes. Nothing may be held."""
        assert not self.used, self.used
        self._kept.clear()
