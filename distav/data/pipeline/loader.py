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

from distav.config.schema import AugmentConfig, DataConfig
from distav.data.dataset import Split
from distav.data.modalities import FeatureStream
from distav.data.pipeline.augmentation import ClipTransformSampler
from distav.data.pipeline.dali import ClipPipeline
from distav.data.pipeline.features import decode_features
from distav.data.pipeline.reader import CorruptSampleError, DecodeError, Members, ShardReader
from distav.data.pipeline.sampler import PADDING, Ids
from distav.data.storage.object_store import CONNECTIONS
from distav.distributed.rng import sample_seeds

_MOST_REFUSED = 64
"""Samples of one batch that may be refused, where most of those tried so far are, before loading is given up."""


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on a device; a copy to a GPU goes through pinned memory and does not wait."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


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


class FeatureCollator:
    """Puts batches of features together."""

    def __init__(self, streams: dict[str, FeatureStream], batch: int, device: torch.device):
        self.streams, self.batch, self.device = streams, batch, device
        self.shapes = {name: ((stream.steps, stream.dim), torch.float32) for name, stream in streams.items()}
        """Shape and dtype of a sample of each output."""

    def run(self, members: Sequence[Members], views: Sequence[object] = ()) -> dict[str, Tensor]:
        """Return the streams of one batch, [B, steps, dim] float32 each; views are for clips.

        Raises:
            DecodeError: where any sample's features are none of its streams'.
        """
        del views
        return {
            name: on_device(
                torch.from_numpy(np.stack([decode_features(each[name], stream) for each in members])), self.device
            )
            for name, stream in self.streams.items()
        }


class Loader:
    """Reads one split for one rank."""

    def __init__(
        self,
        split: Split,
        data: DataConfig,
        augment: AugmentConfig | None,
        seed: int,
        batch: int,
        device: torch.device,
    ):
        self.split, self.data, self.seed, self.device = split, data, seed, device
        self.transform_sampler = None if split.streams else ClipTransformSampler(split, data, augment, seed)
        self.pipeline = (
            FeatureCollator(split.streams, batch, device) if split.streams else ClipPipeline(data, split, batch, device)
        )
        self.reader = ShardReader(split)
        self.quarantine = Quarantine()
        self._pool = ThreadPoolExecutor(CONNECTIONS, "reader") if split.remote else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

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
                yield self._handed_over(item)
        finally:
            stop.set()
            thread.join()

    def load(self, ids: Ids, epoch: int) -> Batch:
        """Read, check and decode one batch."""
        return self._handed_over(self._batch(ids, epoch, list(self._members(ids))))

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
        """Decode one batch; on a GPU in a stream of its own, so that it does not wait for queued training."""
        views = [self.transform_sampler.sample(max(0, int(sample)), epoch) for sample in ids] if self.transform_sampler else [None] * len(ids)
        with torch.cuda.stream(self._stream):
            media = self._decode(ids, members, views)
            valid = torch.tensor([each is not None for each in members])
            batch = Batch(
                ids=on_device(torch.from_numpy(np.maximum(ids, 0)), self.device),
                valid=on_device(valid, self.device),
                seeds=on_device(sample_seeds(self.seed, epoch, torch.from_numpy(ids)), self.device),
                media=media,
            )
        if self._stream:
            self._stream.synchronize()
        return batch

    def _handed_over(self, batch: Batch) -> Batch:
        """Return a batch whose memory is not used again before the caller's stream is done with it."""
        if self._stream:
            for each in (batch.ids, batch.valid, batch.seeds, *batch.media.values()):
                each.record_stream(torch.cuda.current_stream(self.device))
        return batch

    def _decode(self, ids: Ids, members: list[Members | None], views: list) -> dict[str, Tensor]:
        """Decode a batch; a sample that is refused is taken out of `members`.

        Rows without a sample repeat one that was decoded, or are zero where none was.
        """
        rows = [(row, each) for row, each in enumerate(members) if each is not None]
        decoded = self._decode_rows(ids, rows, views)
        if len(decoded) == 1 and len(decoded[0][0]) == len(members):
            return decoded[0][1]
        places = [row for rows, _ in decoded for row in rows]
        for row in set(range(len(members))) - set(places):
            members[row] = None
        media = {}
        for name, (shape, dtype) in self.pipeline.shapes.items():
            media[name] = torch.zeros(len(members), *shape, dtype=dtype, device=self.device)
            if decoded:
                media[name][:] = decoded[0][1][name][0]
                values = torch.cat([each[name] for _, each in decoded])
                media[name].index_copy_(0, on_device(torch.tensor(places), self.device), values)
        return media

    def _decode_rows(
        self, ids: Ids, rows: list[tuple[int, Members]], views: list
    ) -> list[tuple[list[int], dict[str, Tensor]]]:
        """Return what rows of a batch decode to, in as many parts as it takes to leave out those that are refused.

        Halves of a refused batch are tried on their own: one bad sample among b costs 2 log2(b) smaller decodes.
        """
        done: list[tuple[list[int], dict[str, Tensor]]] = []
        waiting, refused = [rows] if rows else [], 0
        while waiting:
            part = waiting.pop()
            places = [row for row, _ in part]
            try:
                done.append((places, self.pipeline.run([each for _, each in part], [views[row] for row in places])))
            except DecodeError as error:
                if len(part) > 1:
                    middle = len(part) // 2
                    waiting += [part[middle:], part[:middle]]
                    continue
                refused += 1
                self.quarantine.reasons[int(ids[places[0]])] = f"not decodable: {error}"
                if refused > max(_MOST_REFUSED, sum(len(each) for each, _ in done)):
                    raise RuntimeError(
                        f"{refused} samples of one batch of split {self.split.name} cannot be decoded, the last of "
                        f"them for this reason: {error}. Look at the split with tools/inspect_shards.py stats."
                    ) from None
        return done

    def _read(self, sample: int) -> Members | None:
        """Read the members of a sample; None for padding, and with an entry in the quarantine for damaged ones."""
        if sample == PADDING or sample in self.quarantine.reasons:
            return None
        try:
            return self.reader.read(sample)
        except CorruptSampleError as reason:
            self.quarantine.reasons[sample] = str(reason)
            return None
