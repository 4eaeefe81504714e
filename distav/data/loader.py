"""Batches from shards: members read and checked, clips decoded and augmented by the DALI graph.

A sample that cannot be used becomes a masked row, counted and named; the batch never gets shorter, so ranks never
wait for one another. Legend: b rows of this rank, T frames, H W pixels, N audio samples.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from distav.data.augment import Viewer
from distav.data.dali import ClipGraph
from distav.data.features import decode_features
from distav.data.format import Split
from distav.data.order import PADDING, Ids
from distav.data.reader import BadSample, DecodeError, Members, ShardReader
from distav.data.remote import CONNECTIONS
from distav.data.streams import Stream
from distav.seeding import sample_seeds
from distav.settings import AugmentSettings, DataSettings

_MOST_TRIED = 1000
"""Samples among which one that can be decoded is looked for."""


@dataclass
class Batch:
    """One rank's part of a batch.

    Attributes:
        ids: [b] int64; where `valid` is false the row carries no sample.
        valid: [b] bool.
        seeds: [b] int64 that make a sample's own random numbers inside the model.
        media: what the model is fed by name: `frames` [b, T, H, W, 3] uint8 and `sound` [b, N] float32 in [-1, 1] of
            clips; or the set's streams of features, [b, steps, dim] float32.
    """

    ids: Tensor
    valid: Tensor
    seeds: Tensor
    media: dict[str, Tensor]


@dataclass
class Quarantine:
    """Samples of one split that could not be used on this rank: {id: reason}."""

    reasons: dict[int, str] = field(default_factory=dict)


class FeatureGraph:
    """Puts batches of one size together."""

    def __init__(self, streams: dict[str, Stream], batch: int, device: torch.device):
        self.streams, self.batch, self.device = streams, batch, device

    def run(self, members: Sequence[Members], views: Sequence[object] = ()) -> dict[str, Tensor]:
        """Return the streams of one batch, [B, steps, dim] float32 each; views are for clips.

        Raises:
            DecodeError: where any sample's features are none of its streams'.
        """
        del views
        return {
            name: torch.from_numpy(np.stack([decode_features(each[name], stream) for each in members])).to(self.device)
            for name, stream in self.streams.items()
        }


class Loader:
    """Reads one split for one rank."""

    def __init__(
        self,
        split: Split,
        data: DataSettings,
        augment: AugmentSettings | None,
        seed: int,
        batch: int,
        device: torch.device,
    ):
        self.split, self.data, self.seed, self.device = split, data, seed, device
        self.viewer = None if split.streams else Viewer(split, data, augment, seed)
        self.graph = (
            FeatureGraph(split.streams, batch, device) if split.streams else ClipGraph(data, split, batch, device)
        )
        self.reader = ShardReader(split)
        self.quarantine = Quarantine()
        self._pool = ThreadPoolExecutor(CONNECTIONS, "reader") if split.remote else None
        self._spare: Members | None = None
        self._proven: Members | None = None

    def close(self) -> None:
        """Close the shard files, and read nothing ahead any more."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self.reader.close()

    def batches(self, plan: Iterable[tuple[Ids, int]]) -> Iterator[Batch]:
        """Yield a batch for each (ids, epoch), decoded ahead in a thread.

        Raises:
            UserError: where a shard cannot be read any more.
        """
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=self.data.prefetch)
        stop = threading.Event()

        def offer(item: Batch | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    return
                except queue.Full:
                    continue

        def produce() -> None:
            try:
                for ids, epoch, members in self._read_ahead(plan):
                    if stop.is_set():
                        return
                    offer(self._batch(ids, epoch, list(members)))
                offer(None)
            except BaseException as error:  # noqa: BLE001  # handed to the thread that waits for the batch
                offer(error)

        thread = threading.Thread(target=produce, name="loader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def load(self, ids: Ids, epoch: int) -> Batch:
        """Read, check and decode one batch."""
        return self._batch(ids, epoch, list(self._members(ids)))

    def _read_ahead(self, plan: Iterable[tuple[Ids, int]]) -> Iterator[tuple[Ids, int, Iterator[Members | None]]]:
        """Yield what is to be loaded with its members; from afar those of the next batches are under way by then."""
        ahead = self.data.prefetch if self._pool else 0
        under_way: deque[tuple[Ids, int, Iterator[Members | None]]] = deque()
        for ids, epoch in plan:
            under_way.append((ids, epoch, self._members(ids)))
            if len(under_way) > ahead:
                yield under_way.popleft()
        yield from under_way

    def _members(self, ids: Ids) -> Iterator[Members | None]:
        """Return the members of each sample; None where there are none to use."""
        return (self._pool.map if self._pool else map)(self._read, ids.tolist())

    def _batch(self, ids: Ids, epoch: int, members: list[Members | None]) -> Batch:
        valid = ids != PADDING
        views = [self.viewer.view(max(0, int(sample)), epoch) for sample in ids] if self.viewer else [None] * len(ids)
        media = self._decode(ids, members, views)
        valid &= np.array([each is not None for each in members])
        return Batch(
            ids=torch.from_numpy(np.maximum(ids, 0)).to(self.device),
            valid=torch.from_numpy(valid).to(self.device),
            seeds=sample_seeds(self.seed, epoch, torch.from_numpy(ids)).to(self.device),
            media=media,
        )

    def _decode(self, ids: Ids, members: list[Members | None], views: list) -> dict[str, Tensor]:
        """Decode a batch; where it is refused, find the samples at fault and take them out of `members`."""
        self._spare = self._spare or next((each for each in members if each is not None), None)
        try:
            decoded = self.graph.run(self._filled(members), views)
            self._proven = self._spare
            return decoded
        except DecodeError as error:
            reason = str(error)
        for row, member in enumerate(members):
            if member is not None and (said := self._refused(member, views[row])):
                members[row] = None
                self.quarantine.reasons[int(ids[row])] = f"not decodable: {said}"
        self._spare = next((each for each in members if each is not None), self._proven) or self._found(views[0])
        if self._spare is None:
            tried = min(len(self.split), _MOST_TRIED)
            raise RuntimeError(
                f"none of the first {tried} samples of split {self.split.name} can be decoded: {reason}; look at them "
                "with tools/inspect_shards.py stats"
            )
        return self.graph.run(self._filled(members), views)

    def _found(self, view: object) -> Members | None:
        """Look for a sample that can be decoded where none of the first batch could."""
        some = (self._read(sample) for sample in range(min(len(self.split), _MOST_TRIED)))
        return next((each for each in some if each and not self._refused(each, view)), None)

    def _filled(self, members: list[Members | None]) -> list[Members]:
        """Put a sample known to be good where there is none; those rows are masked."""
        if self._spare is None:
            self._spare = next(spare for sample in range(len(self.split)) if (spare := self._read(sample)))
        return [each or self._spare for each in members]

    def _refused(self, member: Members, view: object) -> str:
        try:
            self.graph.run([member] * self.graph.batch, [view] * self.graph.batch)  # pyright: ignore[reportArgumentType]
        except DecodeError as error:
            return str(error)
        return ""

    def _read(self, sample: int) -> Members | None:
        """Read the members of a sample; None for padding, and with an entry in the quarantine for damaged ones."""
        if sample == PADDING or sample in self.quarantine.reasons:
            return None
        try:
            return self.reader.read(sample)
        except BadSample as reason:
            self.quarantine.reasons[sample] = str(reason)
            return None
