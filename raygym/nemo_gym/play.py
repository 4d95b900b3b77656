"""What an EnvRunner needs of one NeMo Gym environment: rows, servers, and where those are published."""

from __future__ import annotations

from dataclasses import dataclass, replace

from raygym.nemo_gym.config import NemoGymConfig
from raygym.nemo_gym.layout import Layout, Server, read_layout
from raygym.nemo_gym.resolve import Policy, Resolved, resolve
from raygym.nemo_gym.rows import Row, Source, load_rows, sources
from raygym.types import Task


@dataclass(frozen=True, slots=True)
class Play:
    """How to play the tasks of one environment."""

    layout: Layout
    files: dict[str, tuple[Source, ...]]
    """By split; the files are where the EnvRunner can read them."""
    model: str
    max_turns: int
    endpoints: str = ""
    """The file in which the servers' supervisor publishes their addresses."""

    def row(self, seed: int, split: str) -> Row:
        """The row of a task: a function of its seed, the same at every attempt."""
        rows = load_rows(self.files[split])
        return rows[seed % len(rows)]

    def row_of(self, task: Task) -> Row:
        """See `row`."""
        return self.row(task.seed, task.split)

    def target(self, row: Row) -> str:
        """The server that plays it."""
        return self.layout.target(row.agent)

    def max_steps(self, row: Row) -> int | None:
        """The bound of the row's agent, if it has one."""
        return self.layout.max_steps(self.target(row), row.agent)


@dataclass(frozen=True, slots=True)
class Environment:
    """One environment of the run, checked, with the servers that it needs."""

    section: NemoGymConfig
    resolved: Resolved
    servers: tuple[Server, ...]
    play: Play

    def published_at(self, path: str) -> Environment:
        """The same, with the place where the servers' addresses are."""
        return replace(self, play=replace(self.play, endpoints=path))


def prepare(section: NemoGymConfig, policy: Policy, max_turns: int) -> Environment:
    """Resolve the config, read the datasets, and find the servers that their rows need. Starts nothing.

    Args:
        section: `envs[].nemo_gym`.
        policy: where the policy is served.
        max_turns: generations that an episode may have.

    Raises:
        NemoGymError: what is wrong, and the key.
    """
    resolved = resolve(section, policy)
    layout = read_layout(resolved, section.mode, section.server)
    train = sources(resolved, layout, section.dataset)
    validation = sources(resolved, layout, section.validation_dataset, "validation_dataset") if (
        section.validation_dataset) else train  # fmt: skip
    files = {"train": train, "validation": validation}
    targets = {layout.target(row.agent) for split in files.values() for row in load_rows(split)}
    play = Play(layout, files, policy.model, max_turns)
    return Environment(section, resolved, tuple(layout.needed(targets)), play)
