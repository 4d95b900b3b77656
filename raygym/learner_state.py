"""What a learner needs to go on exactly where it was, as files that any gang can read.

Every parameter has three whole float32 tensors: `weight` (the master weights), `exp_avg` and `exp_avg_sq` (AdamW's
moments). They lie by name in safetensors files of bounded size, so that another number of ranks or another ZeRO stage
finds its part. Beside them is `learner.json`. Reading it runs no code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from raygym.errors import LearnerStateError
from raygym.testing import chaos

KINDS = ("weight", "exp_avg", "exp_avg_sq")
_INDEX = "learner.json"
_FORMAT = 1


class TrainState(Protocol):
    """The parameters and AdamW's state of one rank. All ranks call `read` and `write` in the same order."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> whole shape of every parameter that is trained, in order. The same on all ranks."""

    def read(self, name: str, kind: str) -> Tensor:
        """One tensor of `KINDS`, whole, in float32 on the CPU. It may be the live one: it is not kept."""

    def write(self, name: str, kind: str, value: Tensor) -> None:
        """Make it `value`, which is whole and in float32 on the CPU."""

    def optimizer_steps(self) -> int:
        """Steps that AdamW counts for its bias correction."""

    def begin_write(self, optimizer_steps: int) -> None:
        """Make place for what `write` brings; AdamW then counts `optimizer_steps`."""

    def end_write(self) -> None:
        """All was written: what is computed from it, such as the weights in bfloat16, follows."""


@dataclass(frozen=True, slots=True)
class Gang:
    """Who calls at once: the default process group, unless there is one rank only."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    """Where the process group's backend wants tensors."""

    def from_first(self, value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Rank 0's `value`, on the CPU of every rank; others give None."""
        if self.size == 1:
            assert value is not None
            return value
        sent = value if self.rank == 0 else torch.empty(shape, dtype=dtype)
        assert sent is not None
        sent = sent.to(self.device).contiguous()
        dist.broadcast(sent, src=0)
        return sent.cpu()

    def text_from_first(self, text: str) -> str:
        """Rank 0's `text`, on every rank."""
        if self.size == 1:
            return text
        data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        length = self.from_first(torch.tensor([len(data)]), (1,), torch.int64)
        data = self.from_first(data if self.rank == 0 else None, (int(length),), torch.uint8)
        return data.numpy().tobytes().decode()

    def of_all(self, value: Tensor) -> list[Tensor]:
        """The `value` of each rank, all of the same shape, on the CPU of every rank."""
        if self.size == 1:
            return [value]
        values = [torch.empty_like(value, device=self.device) for _ in range(self.size)]
        dist.all_gather(values, value.to(self.device))
        return [each.cpu() for each in values]


def save_learner_state(folder: Path, state: TrainState, updates: int, gang: Gang, shard_bytes: int = 1 << 30) -> None:
    """Write the state into `folder`, which rank 0 makes. All ranks at once; only rank 0 touches the disk.

    Args:
        folder: where it goes.
        state: of this rank.
        updates: optimizer updates that were made, by which the learning rate goes.
        gang: of all ranks.
        shard_bytes: size of a file, unless a single tensor is larger.

    Raises:
        OSError: on rank 0, what it wrote was refused. All ranks have made their collective calls by then.
    """
    writer = _ShardWriter(folder, shard_bytes) if gang.rank == 0 else None
    for name in state.shapes():
        for kind in KINDS:
            value = state.read(name, kind)
            if writer is not None:
                writer.add(f"{name}.{kind}", value)
    random = {f"cpu.{rank}": value for rank, value in enumerate(gang.of_all(torch.get_rng_state()))}
    if gang.device == "cuda":
        random |= {f"cuda.{rank}": value for rank, value in enumerate(gang.of_all(torch.cuda.get_rng_state()))}
    if writer is not None:
        for name, value in random.items():
            writer.add(f"random.{name}", value)
        index = {
            "format": _FORMAT,
            "updates": updates,
            "optimizer_steps": state.optimizer_steps(),
            "ranks": gang.size,
            "shapes": {name: list(shape) for name, shape in state.shapes().items()},
            "files": writer.close(),
        }
        (folder / _INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def load_learner_state(folder: Path, state: TrainState, gang: Gang) -> int:
    """Take over a saved state. All ranks at once; only rank 0 reads, so the folder may be on its node alone.

    Ranks that the saved gang did not have keep their random generators as they are.

    Returns:
        The optimizer updates that were made.

    Raises:
        LearnerStateError: it is of another policy, or cannot be read; on all ranks.
    """
    with ExitStack() as stack:
        reader = _ShardReader(folder, stack) if gang.rank == 0 else None
        found = gang.text_from_first(reader.index_for(state.shapes()) if reader else "")
        index = json.loads(found)
        if "error" in index:
            raise LearnerStateError(index["error"])
        state.begin_write(index["optimizer_steps"])
        for name, shape in state.shapes().items():
            for kind in KINDS:
                value = reader.tensor(f"{name}.{kind}") if reader else None
                state.write(name, kind, gang.from_first(value, tuple(shape), torch.float32))
        state.end_write()
        _restore_random(reader, gang, index)
    return int(index["updates"])


def _restore_random(reader: _ShardReader | None, gang: Gang, index: Mapping[str, Any]) -> None:
    kinds: list[tuple[str, Callable[[], Tensor], Callable[[Tensor], None]]] = [
        ("cpu", torch.get_rng_state, torch.set_rng_state)
    ]
    if gang.device == "cuda" and "random.cuda.0" in index["files"]:
        kinds.append(("cuda", torch.cuda.get_rng_state, torch.cuda.set_rng_state))
    for kind, current, restore in kinds:
        own = current()
        for rank in range(min(gang.size, index["ranks"])):
            value = reader.tensor(f"random.{kind}.{rank}") if reader else None
            value = gang.from_first(value, tuple(own.shape), torch.uint8)
            if rank == gang.rank:
                restore(value)


class _ShardWriter:
    """Collects tensors until a file is full."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._files: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        self._bytes = self._shards = 0
        self._refused: Exception | None = None

    def add(self, name: str, value: Tensor) -> None:
        if self._tensors and self._bytes + value.nbytes > self._shard_bytes:
            self._flush()
        self._tensors[name] = value.detach().clone().contiguous()
        self._bytes += value.nbytes

    def close(self) -> dict[str, str]:
        """Name -> file of every tensor. Raises what the disk refused before, when other ranks waited for this one."""
        self._flush()
        if self._refused is not None:
            raise self._refused
        return self._files

    def _flush(self) -> None:
        file = f"learner-{self._shards:05d}.safetensors"
        try:
            if self._refused is None:
                chaos.at("disk.learner_state")
                self._folder.mkdir(parents=True, exist_ok=True)
                save_file(self._tensors, self._folder / file)
        except (OSError, SafetensorError) as error:
            self._refused = error
        self._files |= dict.fromkeys(self._tensors, file)
        self._tensors, self._bytes = {}, 0
        self._shards += 1


class _ShardReader:
    """Reads single tensors; files stay open until the stack is left."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._files: dict[str, str] = {}
        self._open: dict[str, Any] = {}

    def index_for(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """The index as JSON, or `{"error": ...}`: no rank may be left waiting for one that has raised."""
        try:
            index = json.loads((self._folder / _INDEX).read_text(encoding="utf-8"))
            if index["format"] != _FORMAT:
                raise LearnerStateError(f"its format is {index['format']}, this raygym reads {_FORMAT}")
            self._files = index["files"]
            for name in set(self._files.values()) - set(_plain(self._files.values())):
                raise LearnerStateError(f"{name!r} is no name of a file in it")
            for problem in _differences(index["shapes"], shapes, self._files):
                raise LearnerStateError(problem)
            for file in sorted(set(self._files.values())):
                self._open[file] = self._stack.enter_context(safe_open(self._folder / file, framework="pt"))
        except Exception as error:  # whatever it is, all ranks have to hear of it
            return json.dumps({"error": f"the learner state in {self._folder} cannot be used: {error}"})
        return json.dumps(index)

    def tensor(self, name: str) -> Tensor:
        value: Tensor = self._open[self._files[name]].get_tensor(name)
        return value


def _plain(names: Iterable[str]) -> Iterator[str]:
    """Those that stay in their folder."""
    return (name for name in names if Path(name).name == name != "..")


def _differences(
    saved: Mapping[str, list[int]], wanted: Mapping[str, tuple[int, ...]], files: Mapping[str, str]
) -> Iterator[str]:
    for what, names in (("lacks", wanted.keys() - saved.keys()), ("has also", saved.keys() - wanted.keys())):
        if names:
            yield f"it {what} {', '.join(sorted(names)[:3])} and is of another policy than the learner's"
    for name, shape in wanted.items():
        if tuple(saved[name]) != tuple(shape):
            yield f"{name} has shape {tuple(saved[name])} in it and {tuple(shape)} in the learner's policy"
        for kind in KINDS:
            if f"{name}.{kind}" not in files:
                yield f"{name}.{kind} is in none of its files"
