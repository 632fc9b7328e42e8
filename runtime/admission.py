"""The waiting sequences: first come first served for each client, clients in turn."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from .sequences import Sequence


class Waiting:
    """Queues by client; `peek` and `pop` take the next client's oldest, preempted sequences before all others."""

    def __init__(self) -> None:
        self._preempted: deque[Sequence] = deque()
        self._clients: OrderedDict[str, deque[Sequence]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._preempted
        for queue in self._clients.values():
            yield from queue

    def push(self, sequence: Sequence) -> None:
        """At the end of its client's queue."""
        self._clients.setdefault(sequence.request.client, deque()).append(sequence)
        self._count += 1

    def push_preempted(self, sequence: Sequence) -> None:
        """Before everything that waits: it has been served already."""
        self._preempted.appendleft(sequence)
        self._count += 1

    def peek(self) -> Sequence | None:
        """The next one, left where it is."""
        if self._preempted:
            return self._preempted[0]
        return next(iter(self._clients.values()))[0] if self._clients else None

    def pop(self) -> Sequence:
        """Take the one that `peek` shows; its client goes to the end of the turn."""
        self._count -= 1
        if self._preempted:
            return self._preempted.popleft()
        client, queue = self._clients.popitem(last=False)
        sequence = queue.popleft()
        if queue:
            self._clients[client] = queue
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take one out of the middle."""
        self._count -= 1
        if sequence in self._preempted:
            self._preempted.remove(sequence)
            return
        queue = self._clients[sequence.request.client]
        queue.remove(sequence)
        if not queue:
            del self._clients[sequence.request.client]
