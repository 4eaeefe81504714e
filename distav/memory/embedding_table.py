"""Embeddings of both modalities of the rows that a rank holds.

Legend: r rows of this rank, m positions of a batch, D width.
"""

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.distributed.rng import sample_seeds, uniform
from distav.memory.row_update import RowUpdate, moving_average

_TILE_NUMBERS, _TILE_NUMBERS_ON_GPU = 2**18, 2**20
"""Numbers of a column that are computed at a time."""
_RNG_STREAMS = {"visual": 1, "audio": 2}
"""Stream of random numbers that initializes the embeddings of a modality, by column.

`distav.data.modalities` is in the same layer as this package and cannot be imported here.
"""


class EmbeddingTable:
    """Moving averages of embeddings, with the number of updates and the pair similarity of each row.

    Attributes:
        ids: ids of the rows.
        columns: `visual`, `audio` [r, D] unit vectors; `visits` [r] number of updates; `pair_similarity` [r] cosine of
            the visual and the audio embedding.
    """

    def __init__(self, ids: range, dim: int, momentum: float, device: torch.device, seed: int, dtype: torch.dtype):
        """Create random unit vectors.

        Args:
            ids: ids of the rows.
            dim: D.
            momentum: weight of the old row in an update.
            device: device of the rows.
            seed: seed of the initial rows.
            dtype: type of `keys`; the columns are float32 in any case.
        """
        self.ids, self._momentum, self._device, self._seed, self._dtype = ids, momentum, device, seed, dtype
        self.columns = {name: torch.empty(len(ids), dim, device=device) for name in _RNG_STREAMS} | {
            "visits": torch.zeros(len(ids), device=device),
            "pair_similarity": torch.zeros(len(ids), device=device),
        }
        self._rounded: dict[str, Tensor] = {}
        if dtype is not torch.float32:
            self._rounded = {name: torch.empty_like(self.columns[name], dtype=dtype) for name in _RNG_STREAMS}
        self.initialize()

    def initialize(self) -> None:
        """Reset the rows to random unit vectors that depend on the id alone, not on the rank that holds it.

        They spread the first targets over the sphere. The embeddings of a new network are nearly identical, so rows
        initialized with them would differ only by their age.
        """
        self.columns["visits"].zero_()
        for name, stream in _RNG_STREAMS.items():
            column = self.columns[name]
            dim = column.shape[1]
            for tile in self._tiles():
                ids = torch.arange(self.ids[tile].start, self.ids[tile].stop, device=self._device)
                draws = uniform(sample_seeds(self._seed, 0, ids), stream, 2 * dim).clamp_min(1e-7)
                radius, angle = (-2 * draws[:, :dim].log()).sqrt(), 2 * math.pi * draws[:, dim:]
                column[tile] = F.normalize(radius * angle.cos(), dim=1)
        self.refresh_pair_similarity()
        self.refresh_keys()

    def refresh_pair_similarity(self) -> None:
        """Compute the pair similarity of all rows from their embeddings."""
        for tile in self._tiles():
            products = self.columns["visual"][tile] * self.columns["audio"][tile]
            self.columns["pair_similarity"][tile] = products.sum(1)

    def refresh_keys(self) -> None:
        """Round the embeddings of all rows to the dtype of `keys`."""
        for name, rounded in self._rounded.items():
            rounded.copy_(self.columns[name])

    def keys(self, name: str) -> Tensor:
        """Return the embeddings of a modality in the dtype of products: [r, D]."""
        return self._rounded.get(name, self.columns[name])

    def update(self, rows: Tensor, embeddings: Mapping[str, Tensor], valid: Tensor) -> RowUpdate:
        """Move rows toward new embeddings: normalize(m * old + (1 - m) * new), after averaging repeated rows.

        Args:
            rows: [m] row of each position of the batch.
            embeddings: [m, D] by modality.
            valid: [m] bool, false for positions that are ignored.

        Returns:
            The update, to apply to other columns of the same rows.
        """
        update = RowUpdate(rows, valid)
        new_rows: dict[str, Tensor] = {}
        for name in _RNG_STREAMS:
            mean = update.mean(embeddings[name])
            new_rows[name] = update.apply(
                self.columns[name],
                lambda old, mean=mean: F.normalize(moving_average(old, mean, self._momentum), dim=1),
            )
            if self._rounded:
                self._rounded[name][update.rows] = new_rows[name].to(self._dtype)
        update.apply(self.columns["visits"], lambda old: old + 1)
        update.apply(self.columns["pair_similarity"], lambda _old: (new_rows["visual"] * new_rows["audio"]).sum(1))
        return update

    def _tiles(self) -> Iterator[slice]:
        """Yield slices of the rows, small enough that temporary tensors take little memory."""
        numbers = _TILE_NUMBERS_ON_GPU if self._device.type == "cuda" else _TILE_NUMBERS
        step = max(1, numbers // self.columns["visual"].shape[1])
        for start in range(0, len(self.ids), step):
            yield slice(start, min(start + step, len(self.ids)))
