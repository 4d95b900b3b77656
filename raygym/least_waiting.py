"""Which of many replicas has the fewest turns waiting, without a look at each of them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """A replica as its turns see it."""

    @property
    def waiting(self) -> int:
        """Turns without an answer."""
        ...

    @property
    def suspect(self) -> bool:
        """Whether it may hang."""
        ...


Client = TypeVar("Client", bound=Waiting)
_Place = tuple[int, int, str]
"""Turns waiting, at least; which one came first; its name."""


class LeastWaiting(Generic[Client]):
    """Replicas by name, in a heap by turns that wait.

    That one has more waiting than its place says is found out when it comes to the top. That it has fewer must be told
    (`fell`). So a choice takes O(log n), as does what is told.
    """

    def __init__(self) -> None:
        self._clients: dict[str, Client] = {}
        self._places: dict[str, _Place] = {}
        """The one that counts of each; its others in the heap are old."""
        self._heap: list[_Place] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._clients)

    def __contains__(self, name: str) -> bool:
        return name in self._clients

    def __iter__(self) -> Iterator[Client]:
        return iter(self._clients.values())

    def __getitem__(self, name: str) -> Client:
        return self._clients[name]

    def get(self, name: str) -> Client | None:
        """None if there is no such replica."""
        return self._clients.get(name)

    def add(self, name: str, client: Client) -> None:
        """One more, or a successor of the same name."""
        self._clients[name] = client
        self._put((client.waiting, next(self._numbers), name))

    def remove(self, name: str) -> None:
        """It is gone."""
        del self._clients[name], self._places[name]

    def fell(self, name: str) -> None:
        """It may have fewer turns waiting than before. One that is not there is passed over."""
        if (client := self._clients.get(name)) is not None and client.waiting < self._places[name][0]:
            self._put((client.waiting, *self._places[name][1:]))

    def least(self) -> str:
        """The name of the one with fewest turns waiting, of equal ones the first that came; suspect ones last.

        Raises:
            IndexError: there is none.
        """
        suspect: list[_Place] = []
        while self._heap:
            place = heapq.heappop(self._heap)
            waiting, number, name = place
            if self._places.get(name) != place:
                continue
            client = self._clients[name]
            if client.waiting > waiting:
                self._put((client.waiting, number, name))
            elif client.suspect:
                suspect.append(place)
            else:
                suspect.insert(0, place)
                break
        for place in suspect:
            heapq.heappush(self._heap, place)
        return suspect[0][2]

    def _put(self, place: _Place) -> None:
        self._places[place[2]] = place
        if len(self._heap) > 4 * len(self._places) + 16:  # most are old
            self._heap = list(self._places.values())
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, place)
