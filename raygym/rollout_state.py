"""Where a run's rollouts stand, with the groups that are whole and wait to be trained, as files that run no code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from raygym.file_manifest import DamagedFolderError
from raygym.open_group import SchedulerState
from raygym.types import EpisodeStatus, Group, Sampling, Task, Trajectory, Turn

_ARRAYS = ("token_ids", "loss_mask", "logprobs", "weight_versions")
# Written and read in a way of their own. `failure`: what is whole has none.
_OTHERS = ("task", "status", "turns", "sampling", "messages", "failure")
# What is added to a trajectory is here by itself.
_PLAIN = [f.name for f in fields(Trajectory) if f.init and f.name not in {*_ARRAYS, *_OTHERS}]


@dataclass(frozen=True, slots=True)
class RolloutState:
    """Of one moment, between two collections."""

    scheduler: SchedulerState = field(default_factory=SchedulerState)
    """What is owed and what was not told yet; groups that are whole are owed, too."""
    whole: tuple[Group, ...] = ()
    """Those, in the order in which they became whole. Without one of them here, it is played again."""

    def resumed(self, step: int, groups_per_step: int, order: Literal["task", "completion"]) -> RolloutState:
        """For the first scheduler of a new process, which has to number its attempts as the first of all did.

        Owed groups get the places of the steps to come. In task order those are the ones that they have, unless steps
        had another size until now, or there were no places.

        Args:
            step: steps that were collected.
            groups_per_step: of a step from now on.
            order: from now on.
        """
        delivered = step * groups_per_step
        owed = sorted(self.scheduler.groups, key=lambda group: (group.slot, group.task))
        if order == "task":
            groups = tuple(replace(group, slot=delivered + place) for place, group in enumerate(owed))
            slots_given = delivered + len(groups)
        else:  # which group is trained when is not known before it is whole
            groups = tuple(replace(group, slot=-1) for group in owed)
            slots_given = 0
        state = replace(self.scheduler, groups=groups, delivered=delivered, slots_given=slots_given, restarts=0)
        return replace(self, scheduler=state)

    def save(self, folder: Path) -> None:
        """Write `rollouts.json` and, where there are whole groups, `groups.safetensors`."""
        records: list[str] = []
        trajectories: list[Trajectory] = []
        for group in self.whole:
            try:
                records.append(json.dumps([_record(t) for t in group.trajectories], default=float))
            except (TypeError, ValueError):
                continue  # a message with an object of the environment's in it; the group is played again
            trajectories += group.trajectories
        data = {"scheduler": self.scheduler.to_json(), "whole": [json.loads(record) for record in records]}
        (folder / "rollouts.json").write_text(json.dumps(data) + "\n", encoding="utf-8")
        if trajectories:
            arrays = {name: np.concatenate([getattr(t, name) for t in trajectories]) for name in _ARRAYS}
            save_file(arrays, folder / "groups.safetensors")

    @classmethod
    def load(cls, folder: Path) -> RolloutState:
        """What `save` wrote.

        Raises:
            DamagedFolderError: it is something else, such as files of a format that could run code.
        """
        try:
            data = json.loads((folder / "rollouts.json").read_text(encoding="utf-8"))
            arrays = load_file(folder / "groups.safetensors") if data["whole"] else {}
            return cls(SchedulerState.from_json(data["scheduler"]), tuple(_groups(data["whole"], arrays)))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            raise DamagedFolderError(
                f"{folder} does not hold rollouts as raygym writes them, in JSON and safetensors "
                f"({type(error).__name__}: {error})"
            ) from error


def _record(trajectory: Trajectory) -> dict[str, Any]:
    return {
        **{name: getattr(trajectory, name) for name in _PLAIN},
        "messages": trajectory.messages,
        "task": asdict(trajectory.task),
        "status": trajectory.status.value,
        "tokens": len(trajectory.token_ids),
        "turns": [asdict(turn) for turn in trajectory.turns],
        "sampling": asdict(trajectory.sampling),
    }


def _groups(whole: list[list[dict[str, Any]]], arrays: dict[str, Any]) -> Iterator[Group]:
    start = 0
    for records in whole:
        trajectories = []
        for record in records:
            end = start + record["tokens"]
            trajectories.append(
                Trajectory(
                    **{name: arrays[name][start:end] for name in _ARRAYS},
                    # An earlier raygym wrote none of what came later.
                    **{name: record[name] for name in _PLAIN if name in record},
                    messages=tuple(record["messages"]),
                    task=Task(**record["task"]),
                    status=EpisodeStatus(record["status"]),
                    turns=tuple(Turn(**turn) for turn in record["turns"]),
                    sampling=Sampling(**record["sampling"]),
                )
            )
            start = end
        yield Group(trajectories[0].group_id, trajectories[0].task, tuple(trajectories))
