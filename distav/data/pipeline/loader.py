"""Batches of one rank: reads and verifies the members of samples, and decodes them ahead of training.

A sample that cannot be read or decoded is quarantined: its row is masked and its reason recorded. Batches always keep
their length, so that ranks stay in step. Legend: b rows of this rank, T frames, H W pixels, N audio samples.
"""

import contextlib
import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from distav.config.schema import AugmentConfig, DataConfig
from distav.data.dataset import Split
from distav.data.modalities import MODALITIES, FeatureStream
from distav.data.pipeline.augmentation import ClipTransformSampler
from distav.data.pipeline.dali import ClipPipeline
from distav.data.pipeline.features import decode_features
from distav.data.pipeline.read_ahead import read_ahead
from distav.data.pipeline.reader import CorruptSampleError, DecodeError, Members, ShardReader
from distav.data.pipeline.sampler import PADDING, Ids
from distav.data.storage.object_store import CONNECTIONS
from distav.data.storage.prefetch import PartPrefetcher
from distav.distributed.rng import sample_seeds

_MAX_UNDECODABLE = 64
"""Undecodable samples of a batch up to which loading continues although they outnumber the decoded ones."""


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device; a copy to a GPU is asynchronous, from pinned memory."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


@dataclass
class Batch:
    """The part of a batch that one rank processes.

    Attributes:
        ids: [b] int64; undefined in rows that are not valid.
        valid: [b] bool, rows that contain a sample.
        present: [b] bool by modality, rows with a sample that has the modality.
        seeds: [b] int64, seeds of the random numbers that the model draws for each sample.
        media: inputs of the model by name: `frames` [b, T, H, W, 3] uint8 and `audio` [b, N] float32 in [-1, 1] of
            clips, zero where a modality is missing; or the feature streams of the dataset, [b, steps, dim] float32.
    """

    ids: Tensor
    valid: Tensor
    present: dict[str, Tensor]
    seeds: Tensor
    media: dict[str, Tensor]

    @property
    def paired(self) -> Tensor:
        """Rows with a sample that has both modalities: [b] bool."""
        return self.present["visual"] & self.present["audio"]


@dataclass
class Quarantine:
    """Samples of one split that this rank could not read or decode: {id: reason}."""

    reasons: dict[int, str] = field(default_factory=dict)


@dataclass
class _DecodedRows:
    """Rows of a batch that were decoded together, with their media."""

    rows: list[int]
    media: dict[str, Tensor]


class FeatureCollator:
    """Decodes and stacks batches of features.

    Args:
        streams: feature streams by name.
        batch: largest batch.
        device: device of the outputs.
    """

    def __init__(self, streams: dict[str, FeatureStream], batch: int, device: torch.device):
        self.streams, self.batch, self.device = streams, batch, device
        self.shapes = {name: ((stream.steps, stream.dim), torch.float32) for name, stream in streams.items()}
        """Shape and dtype of one sample of each output."""

    def run(self, members: Sequence[Members], transforms: Sequence[object] = ()) -> dict[str, Tensor]:
        """Return the streams of a batch, [B, steps, dim] float32 each; features have no transforms.

        Raises:
            DecodeError: if the features of any sample are invalid.
        """
        media = {}
        for name, stream in self.streams.items():
            values = np.stack([decode_features(sample[name], stream) for sample in members])
            media[name] = to_device(torch.from_numpy(values), self.device)
        return media


class Loader:
    """Loads the batches of one split for one rank.

    Args:
        split: the split.
        data: number, stride and size of frames, length of the audio, and prefetching.
        augment: ranges of the random transforms; None: no augmentation.
        seed: seed of the run.
        batch: largest batch.
        device: device of the batches.
        views: number of evenly spaced clips that a sample has without augmentation; their index takes the place of the
            epoch.
    """

    def __init__(
        self,
        split: Split,
        data: DataConfig,
        augment: AugmentConfig | None,
        seed: int,
        batch: int,
        device: torch.device,
        views: int = 1,
    ):
        self.split, self.data, self.seed, self.device = split, data, seed, device
        self.transform_sampler = None if split.streams else ClipTransformSampler(split, data, augment, seed, views)
        self.pipeline = (
            FeatureCollator(split.streams, batch, device) if split.streams else ClipPipeline(data, split, batch, device)
        )
        self.reader = ShardReader(split)
        self._has_modality = {name: split.has_modality(name) for name in MODALITIES}
        self.quarantine = Quarantine()
        self._pool = ThreadPoolExecutor(CONNECTIONS, "reader") if split.remote else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def close(self) -> None:
        """Close the shard files and stop reading ahead."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self.reader.close()

    def batches(self, plan: Iterable[tuple[Ids, int | Ids]]) -> Iterator[Batch]:
        """Yield a batch for each (ids, epoch); a thread decodes up to `data.prefetch` batches ahead.

        Args:
            plan: [b] ids of each batch, and the epoch of its random transforms or [b] epochs of its rows.

        Raises:
            RuntimeError: if most samples of a batch cannot be decoded, or the device fails.
        """
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=self.data.prefetch)
        stop = threading.Event()

        def put(item: Batch | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    return
                except queue.Full:
                    continue

        def produce() -> None:
            try:
                with contextlib.closing(self._read_plan(plan)) as steps:
                    for ids, epoch, members in steps:
                        if stop.is_set():
                            return
                        put(self._decode_batch(ids, epoch, list(members)))
                put(None)
            except BaseException as error:  # noqa: BLE001  # Raised in the consuming thread.
                put(error)

        thread = threading.Thread(target=produce, name="loader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield self._record_stream(item)
        finally:
            stop.set()
            thread.join()

    def load(self, ids: Ids, epoch: int | Ids) -> Batch:
        """Return one batch, read and decoded in the calling thread."""
        return self._record_stream(self._decode_batch(ids, epoch, list(self._members(ids))))

    def _read_plan(
        self, plan: Iterable[tuple[Ids, int | Ids]]
    ) -> Generator[tuple[Ids, int | Ids, Iterator[Members | None]], None, None]:
        """Yield each (ids, epoch) with its members; those of a remote dataset are requested in advance."""
        if self._pool:
            prefetch, block_shards = self.data.prefetch, self.data.shuffle_block_shards
            yield from read_ahead(plan, self.reader, self._pool, self._read, prefetch, block_shards)
        else:
            for ids, epoch in plan:
                yield ids, epoch, self._members(ids)

    def _members(self, ids: Ids) -> Iterator[Members | None]:
        """Return the members of each sample, None for padding and quarantined samples."""
        return (self._pool.map if self._pool else map)(self._read, ids.tolist())

    def _read(self, sample: int, prefetcher: PartPrefetcher | None = None) -> Members | None:
        """Return the members of a sample; None for padding and quarantined samples.

        A sample that cannot be read is quarantined.
        """
        if sample == PADDING or sample in self.quarantine.reasons:
            return None
        try:
            return self.reader.read(sample, prefetcher)
        except CorruptSampleError as error:
            self.quarantine.reasons[sample] = str(error)
            return None

    def _decode_batch(self, ids: Ids, epoch: int | Ids, members: list[Members | None]) -> Batch:
        """Decode a batch; on a GPU in a stream of its own, so that it does not wait for queued training steps."""
        transforms = [None] * len(ids)
        epochs = np.broadcast_to(epoch, ids.shape)
        if self.transform_sampler:
            rows = zip(np.maximum(ids, 0).tolist(), epochs.tolist(), strict=True)
            transforms = [self.transform_sampler.sample(sample, row_epoch) for sample, row_epoch in rows]
        with torch.cuda.stream(self._stream):
            decoded = self._decode_valid(ids, members, transforms)
            valid = torch.zeros(len(ids), dtype=torch.bool)
            valid[[row for part in decoded for row in part.rows]] = True
            batch = Batch(
                ids=to_device(torch.from_numpy(np.maximum(ids, 0)), self.device),
                valid=to_device(valid, self.device),
                present={
                    name: to_device(valid & torch.from_numpy(has_modality[np.maximum(ids, 0)]), self.device)
                    for name, has_modality in self._has_modality.items()
                },
                seeds=to_device(sample_seeds(self.seed, torch.tensor(epochs), torch.from_numpy(ids)), self.device),
                media=self._assemble(decoded, len(ids)),
            )
        if self._stream:
            self._stream.synchronize()
        return batch

    def _decode_valid(self, ids: Ids, members: list[Members | None], transforms: list) -> list[_DecodedRows]:
        """Decode the rows that have members, in as many parts as it takes to exclude undecodable ones.

        If a part cannot be decoded, its halves are decoded separately: one undecodable sample among b costs 2 log2(b)
        smaller decodes. A single undecodable sample is quarantined.
        """
        decoded: list[_DecodedRows] = []
        valid = [row for row, sample in enumerate(members) if sample is not None]
        pending, num_undecodable = [valid] if valid else [], 0
        while pending:
            rows = pending.pop()
            try:
                media = self.pipeline.run([members[row] for row in rows], [transforms[row] for row in rows])  # pyright: ignore
                decoded.append(_DecodedRows(rows, media))
            except DecodeError as error:
                if len(rows) > 1:
                    middle = len(rows) // 2
                    pending += [rows[middle:], rows[:middle]]
                    continue
                num_undecodable += 1
                self.quarantine.reasons[int(ids[rows[0]])] = f"not decodable: {error}"
                if num_undecodable > max(_MAX_UNDECODABLE, sum(len(part.rows) for part in decoded)):
                    raise RuntimeError(
                        f"{num_undecodable} samples of one batch of split {self.split.name} cannot be decoded; last "
                        f"error: {error}. Inspect the split with tools/inspect_shards.py stats."
                    ) from None
        return decoded

    def _assemble(self, decoded: list[_DecodedRows], num_rows: int) -> dict[str, Tensor]:
        """Return the media of a batch from its decoded parts.

        Masked rows repeat a decoded sample, or are zero if there is none.
        """
        if len(decoded) == 1 and len(decoded[0].rows) == num_rows:
            return decoded[0].media
        rows = torch.tensor([row for part in decoded for row in part.rows], dtype=torch.int64)
        media = {}
        for name, (shape, dtype) in self.pipeline.shapes.items():
            media[name] = torch.zeros(num_rows, *shape, dtype=dtype, device=self.device)
            if decoded:
                media[name][:] = decoded[0].media[name][0]
                values = torch.cat([part.media[name] for part in decoded])
                media[name].index_copy_(0, to_device(rows, self.device), values)
        return media

    def _record_stream(self, batch: Batch) -> Batch:
        """Return a batch whose memory is not reused before the caller's stream has finished with it."""
        if self._stream:
            for values in (batch.ids, batch.valid, batch.seeds, *batch.present.values(), *batch.media.values()):
                values.record_stream(torch.cuda.current_stream(self.device))
        return batch
