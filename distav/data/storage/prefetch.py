"""Downloads parts of shards into the cache ahead of their use, each part once for all processes of a machine."""

import heapq
import threading
import time
from enum import IntEnum
from pathlib import Path

import numpy as np

from distav.data.storage.cache import LOCKS
from distav.data.storage.locks import NamedLocks
from distav.data.storage.object_store import ObjectStore
from distav.data.storage.parts import Array, PartLayout

PART_CONNECTIONS = 8
"""Concurrent downloads of a process."""
MIN_PLANNED_FRACTION = 0.4
"""Fraction of a part that has to be planned on this machine for the part to be downloaded."""
_POLL_S = 0.02
"""How often a download of another process is looked at."""
_RETRY_S = 1.0
"""How long downloads wait after the cache was full of locked parts."""


class _State(IntEnum):
    """State of a part."""

    UNKNOWN = 0
    """Not wanted."""
    QUEUED = 1
    """Wanted and not cached."""
    POSTPONED = 2
    """Wanted, but too little of it is planned."""
    LOADING = 3
    """Being downloaded by this object."""
    ELSEWHERE = 4
    """Being downloaded by another process."""
    CACHED = 5
    FAILED = 6
    """The store or the cache failed."""


class PartPrefetcher:
    """Downloads the parts that a process will read, in the order of their first use.

    A range that is read is first planned, then wanted, and finally done. Planned ranges tell how much of a part is
    needed; parts of wanted ranges are downloaded, and are not evicted until they are done. Parts of which little is
    needed, and parts for which the cache has no room, are not downloaded; their ranges have to be read from the store.

    Args:
        store: the dataset, with a cache.
        layout: parts of its shards.
        local_size: processes of this machine that read the split together: each is assumed to plan as much of a part
            as this one, and may keep its fraction of the cache for its downloads.

    Raises:
        OSError: if the cache cannot be written.
    """

    def __init__(self, store: ObjectStore, layout: PartLayout, local_size: int = 1):
        self.store, self.layout, self.local_size = store, layout, local_size
        self._max_held_bytes = store.cache.max_bytes // local_size
        num_parts = int(layout.first[-1])
        self._state = np.zeros(num_parts, np.uint8)
        self._planned_bytes = np.zeros(num_parts, np.int64)
        self._wanted_reads = np.zeros(num_parts, np.int64)
        self._wanted_parts_of_shard = np.zeros(len(layout.shards), np.int64)
        self.planned_part_bytes = 0
        """Size of all parts of which a range is planned."""
        self._held: set[int] = set()
        self._held_bytes = 0
        self._queue: list[tuple[int, int]] = []
        self._num_wanted = 0
        self._full_until = 0.0
        self._broken = self._closed = False
        self._changed = threading.Condition()
        self._locks = NamedLocks(store.cache.folder / LOCKS)
        self._num_threads = 0

    def close(self) -> None:
        """Stop: release all parts, and let downloads in progress end by themselves; waiting readers get None."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            for shard in np.flatnonzero(self._wanted_parts_of_shard).tolist():
                self._locks.release(self.layout.shards[shard])
            self._changed.notify_all()
            if not self._num_threads:
                self._locks.close()

    def plan(self, shards: Array, starts: Array, ends: Array) -> None:
        """Announce ranges: [n] their shards, first bytes, and the bytes after the last ones."""
        parts, sizes = self.layout.of_ranges(shards, starts, ends)
        with self._changed:
            new = np.unique(parts[self._planned_bytes[parts] == 0])
            self.planned_part_bytes += int(self.layout.size[new].sum())
            np.add.at(self._planned_bytes, parts, sizes)
            for part in np.unique(parts[self._state[parts] == _State.POSTPONED]).tolist():
                if self._is_worthwhile(part):
                    self._enqueue(part)

    def want(self, shards: Array, starts: Array, ends: Array) -> None:
        """Request the parts of planned ranges."""
        parts, _ = self.layout.of_ranges(shards, starts, ends)
        with self._changed:
            _, first = np.unique(parts, return_index=True)
            for part in parts[np.sort(first)].tolist():
                if not self._wanted_reads[part]:
                    self._lock_shard(int(self.layout.shard[part]))
                    self._enqueue(part)
            np.add.at(self._wanted_reads, parts, 1)
            self._changed.notify_all()

    def read(self, shard: int, start: int, end: int) -> bytes | None:
        """Return a wanted range; waits for its parts. None if they are not downloaded."""
        with self._changed:
            for part, _, _ in self.layout.of_range(shard, start, end):
                while self._is_expected(part):
                    self._changed.wait(_POLL_S if self._state[part] == _State.ELSEWHERE else None)
        return self.layout.read_cached(self.store.cache, shard, start, end)

    def done(self, shard: int, start: int, end: int) -> None:
        """Mark one read of a wanted range as done."""
        with self._changed:
            for part, begin, stop in () if self._closed else self.layout.of_range(shard, start, end):
                self._planned_bytes[part] -= stop - begin
                if not self._planned_bytes[part]:
                    self.planned_part_bytes -= int(self.layout.size[part])
                self._wanted_reads[part] -= 1
                if not self._wanted_reads[part]:
                    self._unlock_part(part)

    def _lock_shard(self, shard: int) -> None:
        if not self._wanted_parts_of_shard[shard]:
            self._locks.share(self.layout.shards[shard])
        self._wanted_parts_of_shard[shard] += 1

    def _unlock_part(self, part: int) -> None:
        if self._state[part] != _State.LOADING:
            self._state[part] = _State.UNKNOWN
        self._release_hold(part)
        shard = int(self.layout.shard[part])
        self._wanted_parts_of_shard[shard] -= 1
        if not self._wanted_parts_of_shard[shard]:
            self._locks.release(self.layout.shards[shard])
            self._full_until = 0.0
            self._changed.notify_all()

    def _enqueue(self, part: int) -> None:
        """Set the state of a wanted part, and queue it unless it is cached or too little of it is planned."""
        if self._state[part] == _State.LOADING:
            return
        if self.layout.is_cached(self.store.cache, part):
            self._state[part] = _State.CACHED
        elif not self._is_worthwhile(part):
            self._state[part] = _State.POSTPONED
        else:
            self._state[part] = _State.QUEUED
            self._num_wanted += 1
            heapq.heappush(self._queue, (self._num_wanted, part))
            if self._num_threads < PART_CONNECTIONS:
                self._num_threads += 1
                threading.Thread(target=self._download_parts, name="parts", daemon=True).start()
            self._changed.notify_all()

    def _is_worthwhile(self, part: int) -> bool:
        planned = int(self._planned_bytes[part]) * self.local_size
        return planned >= MIN_PLANNED_FRACTION * int(self.layout.size[part])

    def _is_expected(self, part: int) -> bool:
        """Return whether a part that is not cached yet will be."""
        if self._closed:
            return False
        if self._state[part] == _State.ELSEWHERE:
            name = self.layout.name(part)
            if self.layout.is_cached(self.store.cache, part):
                self._state[part] = _State.CACHED
            elif self._locks.try_acquire(name):  # The other process ended or failed.
                self._locks.release(name)
                self._enqueue(part)
        if self._state[part] == _State.QUEUED:
            return self._has_room(part)
        return self._state[part] in (_State.LOADING, _State.ELSEWHERE)

    def _has_room(self, part: int) -> bool:
        if self._broken or time.monotonic() < self._full_until:
            return False
        return not self._held or self._held_bytes + int(self.layout.size[part]) <= self._max_held_bytes

    def _download_parts(self) -> None:
        while (part := self._next_part()) is not None:
            state = self._download(part)
            with self._changed:
                self._state[part] = state if self._wanted_reads[part] else _State.UNKNOWN
                if state != _State.CACHED:
                    self._release_hold(part)
                if self._state[part] == _State.QUEUED:
                    heapq.heappush(self._queue, (0, part))
                self._changed.notify_all()

    def _next_part(self) -> int | None:
        """Return the next part to download; waits for one. None when closed."""
        with self._changed:
            while not self._closed:
                while self._queue and self._state[self._queue[0][1]] != _State.QUEUED:
                    heapq.heappop(self._queue)
                if self._queue and self._has_room(self._queue[0][1]):
                    part = heapq.heappop(self._queue)[1]
                    self._state[part] = _State.LOADING
                    self._held.add(part)
                    self._held_bytes += int(self.layout.size[part])
                    return part
                self._changed.wait(_RETRY_S if self._queue else None)
            self._num_threads -= 1
            if not self._num_threads:
                self._locks.close()
        return None

    def _release_hold(self, part: int) -> None:
        if part in self._held:
            self._held.remove(part)
            self._held_bytes -= int(self.layout.size[part])
            self._changed.notify_all()

    def _download(self, part: int) -> _State:
        """Download a part unless it is cached or being downloaded; return its state."""
        name, cache = self.layout.name(part), self.store.cache
        try:
            if not self._locks.try_acquire(name):
                return _State.ELSEWHERE
            try:
                if self.layout.is_cached(cache, part):
                    return _State.CACHED
                reserved = cache.reserve(int(self.layout.size[part]))
                if reserved is None:
                    self._full_until = time.monotonic() + _RETRY_S
                    return _State.QUEUED
                cache.store(reserved, name, self._request(part, reserved))
                return _State.CACHED
            finally:
                self._locks.release(name)
        except OSError as error:
            cache.warn(error)
            self._broken = True
            return _State.FAILED
        except Exception:  # noqa: BLE001  # Readers request the range themselves, and report the error.
            return _State.FAILED

    def _request(self, part: int, reserved: Path) -> bytes:
        """Return the bytes of a part from the store; give up its reserved file if that fails."""
        shard, start, size = (int(values[part]) for values in (self.layout.shard, self.layout.start, self.layout.size))
        try:
            return self.store.read_range(self.layout.shards[shard], start, size)
        except BaseException:
            self.store.cache.discard(reserved)
            raise
