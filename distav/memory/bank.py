"""The cross-modal memory bank: one row per sample and modality, stored on the rank that owns the sample's id.

A step exchanges only the rows of the batch; traffic does not depend on the size of the bank. A small bank can be
replicated: every rank then holds all embeddings, and the loss exchanges only the new rows. Rows are stored in
float32, since a moving average in bfloat16 stalls.
Legend: N rows, n rows of this rank, b samples of this rank's batch, B of all ranks, D width, K categories.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from distav.distributed.collectives import all_gather_variable_rows, get_world_size, local_batch, shard_range
from distav.memory.bank_state import restore_columns, save_columns
from distav.memory.category_gram import CategoryAssignments
from distav.memory.embedding_table import EmbeddingTable
from distav.memory.global_batch import GlobalBatch
from distav.memory.row_router import RowRouter
from distav.memory.row_update import RowUpdate, moving_average


class Bank:
    """Embeddings of both modalities, with the number of updates, the pair correspondence and the categories of a row.

    Attributes:
        rows: ids that this rank owns.
        resident: ids whose embeddings this rank holds: all ids if the bank is replicated, else `rows`.
        replicated: whether every rank holds the embeddings of all ids.
        assignments: categories of the owned rows and their Gram matrices.
        router: exchange of rows between ranks.
        present: [N] bool by modality, samples that have it; empty if all samples have both. Rows of a missing modality
            are neither keys nor part of a pair.
    """

    def __init__(
        self,
        num_samples: int,
        dim: int,
        momentum: float,
        device: torch.device,
        seed: int = 0,
        *,
        num_categories: int = 0,
        replicated: bool = False,
        dtype: torch.dtype = torch.float32,
        present: Mapping[str, Tensor] = MappingProxyType({}),
    ):
        """Create a bank of random unit vectors.

        Args:
            num_samples: N.
            dim: D.
            momentum: weight of the old row in an update.
            device: device of the rows.
            seed: seed of the initial rows.
            num_categories: K; 0 stores no categories.
            replicated: store all embeddings on every rank.
            dtype: type of the rows in products; rows are stored in float32 in any case.
            present: [N] bool by modality, samples that have it; empty: all.
        """
        complete = all(bool(has_modality.all()) for has_modality in present.values())
        self.present = {} if complete else {name: has_modality.to(device) for name, has_modality in present.items()}
        self.num_samples, self.momentum, self.device, self.dtype = num_samples, momentum, device, dtype
        self.replicated = replicated and get_world_size() > 1
        self.rows = shard_range(num_samples)
        self.resident = range(num_samples) if self.replicated else self.rows
        self._embeddings = EmbeddingTable(self.resident, dim, momentum, device, seed, dtype)
        owned = slice(self.rows.start - self.resident.start, self.rows.stop - self.resident.start)
        self._columns = {name: column[owned] for name, column in self._embeddings.columns.items()} | {
            "correspondence": torch.ones(len(self.rows), device=device),
            "category_agreement": torch.ones(len(self.rows), device=device),
        }
        self.assignments = CategoryAssignments(len(self.rows), num_categories, device)
        if num_categories:
            self._columns["categories"] = self.assignments.quantized
        self._built_in = frozenset(self._columns)
        self.router = RowRouter(num_samples, device)

    @property
    def columns(self) -> Mapping[str, Tensor]:
        """State of the owned rows by name, [n, ...] each.

        - `visual`, `audio`: [n, D] embeddings.
        - `visits`: [n] number of updates of the row.
        - `pair_similarity`: [n] cosine of the visual and the audio embedding.
        - `correspondence`: [n] correspondence probability of the pair.
        - `category_agreement`: [n] moving average of the agreement of the categories of both modalities.
        - `categories`: [n, 2, K] uint8, see `CategoryAssignments.quantized`.
        - the columns of phases, added by `register_column` and `store_column`.

        All of them are saved and restored.
        """
        return MappingProxyType(self._columns)

    def register_column(self, name: str, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Add a column of zeros; a column that exists already, such as a restored one, is left unchanged.

        Args:
            name: name of the column.
            shape: shape of a row.
            dtype: type of the numbers.

        Returns:
            The column of the owned rows, [n, *shape].

        Raises:
            ValueError: if the column exists with another shape or dtype.
        """
        if name not in self._columns:
            self._columns[name] = torch.zeros(len(self.rows), *shape, dtype=dtype, device=self.device)
        column = self._columns[name]
        if column.shape[1:] != torch.Size(shape) or column.dtype is not dtype:
            raise ValueError(
                f"bank column '{name}' exists with rows of shape {tuple(column.shape[1:])} and {column.dtype}; "
                f"requested: {tuple(shape)} and {dtype}"
            )
        return column

    def store_column(self, name: str, values: Tensor) -> None:
        """Replace a column by values [n, ...] of the owned rows; adds the column if it does not exist.

        Raises:
            ValueError: if there is not one value per owned row, or a built-in column has another shape or dtype.
        """
        if len(values) != len(self.rows):
            raise ValueError(f"bank column '{name}': {len(values)} rows given; this rank owns {len(self.rows)}")
        if name in self._built_in:  # Other tensors are views of a built-in column.
            self.register_column(name, values.shape[1:], values.dtype).copy_(values)
        else:
            self._columns[name] = values

    def pop_column(self, name: str) -> Tensor:
        """Remove a column that a phase added, and return it.

        Raises:
            ValueError: for a built-in column.
        """
        if name in self._built_in:
            raise ValueError(f"bank column '{name}' is built in and cannot be removed")
        return self._columns.pop(name)

    def reinitialize(self) -> None:
        """Reset embeddings, visits and categories to their initial values; the correspondence is kept."""
        self._embeddings.initialize()
        self._columns["category_agreement"].fill_(1.0)
        self.assignments.clear()

    def refresh(self) -> None:
        """Recompute what is derived from the columns, after columns were modified in place."""
        self._embeddings.refresh_pair_similarity()
        self._embeddings.refresh_keys()
        self.assignments.recount()

    def keys(self, name: str) -> Tensor:
        """Return the resident rows of a modality in the dtype of products: [resident, D]."""
        return self._embeddings.keys(name)

    def resident_column(self, name: str) -> Tensor:
        """Return `visits` or `pair_similarity` of the resident rows: [resident]."""
        return self._embeddings.columns[name]

    def key_bias(self, name: str, mask_uninitialized: bool = False) -> Tensor | None:
        """Return the bias that masks resident rows in a softmax, [resident]: -inf or 0; None if no row is masked.

        Args:
            name: modality of the keys; rows of samples without it are masked.
            mask_uninitialized: whether rows that were never updated are masked.
        """
        kept = [self.resident_column("visits") > 0] if mask_uninitialized else []
        if name in self.present:
            kept.append(self.present[name][self.resident.start : self.resident.stop])
        if not kept:
            return None
        masked = ~torch.stack(kept).all(0)
        return torch.zeros_like(masked, dtype=torch.float32).masked_fill_(masked, -torch.inf)

    def has_modality(self, name: str) -> bool:
        """Return whether any sample has a modality."""
        return name not in self.present or bool(self.present[name].any())

    def has_pairs(self) -> bool:
        """Return whether any sample has both modalities."""
        return not self.present or bool(torch.stack(list(self.present.values())).all(0).any())

    def local_index(self, ids: Tensor) -> Tensor:
        """Return the position of each id among the resident rows, -1 for rows of other ranks: [B] -> [B]."""
        index = ids - self.resident.start
        return index.masked_fill((index < 0) | (index >= len(self.resident)), -1)

    def fetch(self, names: Sequence[str], ids: Tensor) -> list[Tensor]:
        """Return the rows of this rank's batch from the ranks that own them.

        Args:
            names: columns to read.
            ids: [B] of all ranks, the same on every rank.

        Returns:
            [b, ...] for each name.
        """
        batch_ids = local_batch(ids)
        columns = [self._columns[name] for name in names]
        if get_world_size() == 1:
            return [column[batch_ids] for column in columns]
        if self.replicated and all(name in self._embeddings.columns for name in names):
            return [self._embeddings.columns[name][batch_ids] for name in names]
        widths = [math.prod(column.shape[1:]) for column in columns]
        index = ids[self.router.owned(ids)] - self.rows.start
        flat = [column[index].view(len(index), width).float() for column, width in zip(columns, widths, strict=True)]
        parts = self.router.gather_from_owners(torch.cat(flat, dim=1), ids).split(widths, dim=1)
        return [part.reshape(len(batch_ids), *column.shape[1:]) for part, column in zip(parts, columns, strict=True)]

    def write(self, name: str, values: Tensor, ids: Tensor, valid: Tensor) -> None:
        """Write rows of this rank's batch to the ranks that own them; values of repeated ids are averaged.

        Args:
            name: column to write.
            values: [b, ...] of this rank's batch.
            ids, valid: [B] of all ranks; rows that are not valid or not finite are not written.
        """
        rows = self.router.scatter_to_owners(values.reshape(len(values), -1).float(), ids)
        owned, column = self.router.owned(ids), self._columns[name]
        update = RowUpdate(ids[owned] - self.rows.start, valid[owned] & torch.isfinite(rows.sum(1)))
        mean = update.mean(rows).view(-1, *column.shape[1:]).to(column.dtype)
        update.apply(column, lambda _old: mean)

    def gather_column(self, name: str) -> Tensor:
        """Return a column with one number per row for all ids: [N]."""
        return all_gather_variable_rows(self._columns[name])

    def pair_similarity(self) -> Tensor:
        """Return the cosine of the visual and the audio embedding of every pair: [N].

        NaN for rows that were never updated, and for samples with one modality.
        """
        similarity = self._columns["pair_similarity"].masked_fill(self._columns["visits"] == 0, torch.nan)
        similarity = all_gather_variable_rows(similarity)
        if self.present:
            similarity = similarity.masked_fill(~torch.stack(list(self.present.values())).all(0), torch.nan)
        return similarity

    def set_correspondence(self, correspondence: Tensor) -> None:
        """Store the correspondence probabilities of all pairs: [N], the same on every rank."""
        self._columns["correspondence"].copy_(correspondence[self.rows.start : self.rows.stop])

    def update(self, global_batch: GlobalBatch, agreement: Tensor, category_probs: Tensor | None = None) -> None:
        """Move rows toward new embeddings: normalize(m * old + (1 - m) * new), after averaging repeated ids.

        Rows with embeddings that are not finite are left unchanged.

        Args:
            global_batch: embeddings of all ranks.
            agreement: [b] category agreement of this rank's batch.
            category_probs: [b, 2, K] visual and audio category probabilities, 0..1, scaled by the square root of the
                weight of the pair.
        """
        ids, visual, audio = global_batch.ids, global_batch.visual, global_batch.audio
        owned = self.router.owned(ids)
        resident = slice(None) if self.replicated else owned
        valid = global_batch.valid & torch.isfinite(visual.sum(1)) & torch.isfinite(audio.sum(1))
        embedding_update = self._embeddings.update(
            ids[resident] - self.resident.start,
            {"visual": visual[resident], "audio": audio[resident]},
            valid[resident],
        )

        values = [agreement[:, None]]
        if category_probs is not None:
            values.append(category_probs.flatten(1))
        rows = self.router.scatter_to_owners(torch.cat(values, dim=1).detach().float(), ids)
        same_rows = None if self.replicated else embedding_update
        update = RowUpdate(ids[owned] - self.rows.start, valid[owned] & torch.isfinite(rows.sum(1)), same_rows)
        mean = update.mean(rows)
        update.apply(self._columns["category_agreement"], lambda old: moving_average(old, mean[:, 0], self.momentum))
        if category_probs is not None:
            mean_probs = mean[:, 1:].view(-1, *category_probs.shape[1:])
            self.assignments.replace(update.rows, mean_probs, update.written, update.is_first)

    def state(self) -> dict[str, Tensor]:
        """Return CPU copies of the columns of this rank's rows for a checkpoint, with the range of their ids."""
        return save_columns(self._columns, self.rows, self.num_samples)

    def restore(self, parts: Iterable[dict[str, Tensor]]) -> None:
        """Restore this rank's rows from the states of any number of ranks; reads only the parts that it needs.

        Raises:
            ValueError: if the number of samples differs or the parts do not contain all rows of this rank.
        """
        restore_columns(parts, self.num_samples, self.resident, self._restored_column)
        self._embeddings.refresh_keys()
        self.assignments.recount()

    def _restored_column(self, name: str, saved: Tensor) -> tuple[Tensor, range]:
        """Return the column that a saved column is copied to, and the ids of its rows."""
        if name in self._embeddings.columns:
            return self._embeddings.columns[name], self.resident
        return self.register_column(name, saved.shape[1:], saved.dtype), self.rows
