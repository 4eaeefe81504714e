"""The hybrid attention network that parses a video into events heard and seen (HAN; Tian et al. 2020; VALOR's sizes).

Legend: B videos, T segments, E width, C classes, S steps of a feature stream.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distav.config.schema import ParserConfig
from distav.data.modalities import MODALITIES
from distav.data.modalities import FeatureStream as Features
from distav.models.layers import SeededDropout

_DROPOUT_STREAM = 100
"""First of the streams of a sample's random numbers that drop entries here."""


class TokenSpec(NamedTuple):
    """Features that a frozen network gave of one modality.

    Attributes:
        name: of the feature, as in the shards.
        dim: width.
        grid: rows and columns of a token map, such as (2, 32) of CLAP's; None for a sequence.
    """

    name: str
    dim: int
    grid: tuple[int, int] | None = None


class Parsed(NamedTuple):
    """What the network says of videos.

    Attributes:
        segments: [B, 2, T, C] logits of each class, heard and seen in each segment.
        video: [B, C] probability that the class occurs.
        modality: [B, 2, C] probability that it is heard, and seen.
    """

    segments: Tensor
    video: Tensor
    modality: Tensor


class SegmentEmbedding(nn.Module):
    """One modality's streams, brought to T segments and one width: each is projected and averaged over its steps."""

    _MAP_STEPS = 1024

    def __init__(self, streams: Sequence[TokenSpec], width: int, segments: int):
        super().__init__()
        self.streams, self.segments = tuple(streams), segments
        self.project = nn.ModuleList(nn.Linear(each.dim, width) for each in streams)
        self.join = nn.Linear(width * len(streams), width) if len(streams) > 1 else nn.Identity()

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Embed [B, S, dim] of every stream: [B, T, E]."""
        parts = [self._embed(*each) for each in zip(self.streams, self.project, features, strict=True)]
        return self.join(torch.cat(parts, dim=2))

    def _embed(self, stream: TokenSpec, project: nn.Module, values: Tensor) -> Tensor:
        if stream.grid is None:
            steps = project(values)
        else:  # VALOR++: the map is stretched in time, projected, and averaged over its rows.
            rows, columns = stream.grid
            grid = values.transpose(1, 2).unflatten(2, (rows, columns))
            grid = F.interpolate(grid.float(), (rows, self._MAP_STEPS), mode="bicubic").to(values.dtype)
            steps = project(grid.permute(0, 2, 3, 1)).mean(dim=1)
        return F.adaptive_avg_pool1d(steps.transpose(1, 2), self.segments).transpose(1, 2)


class _Unbiased(nn.Linear):
    """A linear layer whose bias begins at zero."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Attention with several heads, whose dropout hangs on each sample's seed.

    The weights of queries, keys and values are its own and not a layer's, since ZeRO-3 gathers what the module has that
    is called; and they are set up before its end, at which ZeRO-3 spreads them.
    """

    def __init__(self, width: int, heads: int, dropout: float, stream: int):
        super().__init__()
        self.heads = heads
        self.project_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.project_bias = nn.Parameter(torch.zeros(3 * width))
        self.out = _Unbiased(width, width)
        self.drop = SeededDropout(dropout, stream)

    def forward(self, queries: Tensor, keys: Tensor, seeds: Tensor) -> Tensor:
        """Let queries [B, T, E] attend to keys [B, T, E]."""
        by_query, by_key = (F.linear(each, self.project_weight, self.project_bias) for each in (queries, keys))
        width = queries.shape[2]
        q, k, v = by_query[..., :width], by_key[..., width : 2 * width], by_key[..., 2 * width :]
        q, k, v = (each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in (q, k, v))
        shares = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)
        shares = self.drop(shares.flatten(1), seeds).view_as(shares)
        return self.out((shares @ v).transpose(1, 2).flatten(2))


class HybridLayer(nn.Module):
    """Every segment attends to its own modality and to the other; both modalities share the weights."""

    def __init__(self, width: int, heads: int, ffn_dim: int, dropout: float, number: int):
        super().__init__()
        first = _DROPOUT_STREAM + 10 * number
        self.own = Attention(width, heads, dropout, first)
        self.other = Attention(width, heads, dropout, first + 1)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.inside, self.outside = nn.Linear(width, ffn_dim), nn.Linear(ffn_dim, width)
        self.drops = nn.ModuleList(SeededDropout(dropout, first + 2 + place) for place in range(4))

    def forward(self, x: Tensor, other: Tensor, seeds: Tensor) -> Tensor:
        """Update one modality by itself and the other: [B, T, E] twice -> [B, T, E]; normalised after each sum."""
        crossed, own = self.other(x, other, seeds), self.own(x, x, seeds)
        x = self.norms[0](x + self._drop(0, crossed, seeds) + self._drop(1, own, seeds))
        hidden = self._drop(2, F.relu(self.inside(x)), seeds)
        return self.norms[1](x + self._drop(3, self.outside(hidden), seeds))

    def _drop(self, place: int, values: Tensor, seeds: Tensor) -> Tensor:
        return self.drops[place](values.flatten(1), seeds).view_as(values)


class AttentivePooling(nn.Module):
    """Probabilities of segments, pooled over time and modality by learnt weights.

    As published, weights are normalised over time for each modality and over modalities for each segment, and their
    product adds up to anything between 0 and 2; probabilities are cut off at 1. With `joint` they are one softmax over
    both, and nothing is cut off.
    """

    _EDGE = 1e-7

    def __init__(self, width: int, num_classes: int, joint: bool):
        super().__init__()
        self.classify = nn.Linear(width, num_classes)
        self.weigh_time, self.weigh_modality = nn.Linear(width, num_classes), nn.Linear(width, num_classes)
        self.joint = joint

    def forward(self, embedded: Tensor) -> Parsed:
        """Pool [B, 2, T, E]."""
        segments = self.classify(embedded).float()
        by_time, by_modality = self.weigh_time(embedded).float(), self.weigh_modality(embedded).float()
        shares, over_time = segments.sigmoid(), by_time.softmax(dim=2)
        if self.joint:
            weights = (by_time + by_modality).flatten(1, 2).softmax(dim=1).view_as(shares)
        else:
            weights = over_time * by_modality.softmax(dim=1)
        video = (weights * shares).sum(dim=(1, 2)).clamp(self._EDGE, 1 - self._EDGE)
        modality = (over_time * shares).sum(dim=2).clamp(self._EDGE, 1 - self._EDGE)
        return Parsed(segments, video, modality)


class EventParser(nn.Module):
    """Embeddings of segments, layers of hybrid attention, attentive pooling.

    VALOR's code lets pictures attend to sounds that the same layer has updated; HAN's lets both attend to what came in.
    """

    def __init__(
        self,
        audio: Sequence[TokenSpec],
        visual: Sequence[TokenSpec],
        num_classes: int,
        *,
        segments: int = 10,
        width: int = 512,
        depth: int = 1,
        heads: int = 8,
        ffn_dim: int = 1024,
        dropout: float = 0.1,
        sequential_update: bool = False,
        joint_pooling: bool = False,
    ):
        super().__init__()
        self.embed_audio = SegmentEmbedding(audio, width, segments)
        self.embed_visual = SegmentEmbedding(visual, width, segments)
        self.layers = nn.ModuleList(HybridLayer(width, heads, ffn_dim, dropout, number) for number in range(depth))
        self.pool = AttentivePooling(width, num_classes, joint_pooling)
        self.sequential_update = sequential_update

    def forward(self, audio: Sequence[Tensor], visual: Sequence[Tensor], seeds: Tensor) -> Parsed:
        """Parse videos.

        Args:
            audio, visual: [B, S, dim] of every stream.
            seeds: [B] int64, the random numbers of dropout.
        """
        heard, seen = self.embed_audio(audio), self.embed_visual(visual)
        for layer in self.layers:
            before = heard
            heard = layer(heard, seen, seeds)
            seen = layer(seen, heard if self.sequential_update else before, seeds)
        return self.pool(torch.stack([heard, seen], dim=1))


def build_parser(
    settings: ParserConfig, audio: Sequence[TokenSpec], visual: Sequence[TokenSpec], num_classes: int, segments: int
) -> EventParser:
    """Return the parser that the settings name."""
    return EventParser(
        audio,
        visual,
        num_classes,
        segments=segments,
        width=settings.width,
        depth=settings.depth,
        heads=settings.heads,
        ffn_dim=settings.ffn_dim,
        dropout=settings.dropout,
        sequential_update=settings.sequential_update,
        joint_pooling=settings.joint_pooling,
    )


class FeatureParser(nn.Module):
    """The event parser over features that are stored in place of clips."""

    def __init__(self, settings: ParserConfig, streams: Mapping[str, Features], segments: int, num_classes: int):
        super().__init__()
        self.segments = segments
        self.modalities = [
            [name for name, each in streams.items() if each.modality == modality] for modality in MODALITIES
        ]
        heard, seen = (
            [TokenSpec(name, streams[name].dim, _grid(settings, name)) for name in names] for names in self.modalities
        )
        self.parse = build_parser(settings, heard, seen, num_classes, segments)

    def forward(self, seeds: Tensor, parse: bool = True, **features: Tensor) -> dict[str, Tensor]:
        """Parse streams [B, steps, dim] by name; returns what `Parsed` holds."""
        dtype = next(self.parameters()).dtype
        audio, visual = ([features[name].to(dtype) for name in names] for names in self.modalities)
        return self.parse(audio, visual, seeds)._asdict()


def _grid(settings: ParserConfig, name: str) -> tuple[int, int] | None:
    rows_and_columns = settings.token_grids.get(name)
    return (rows_and_columns[0], rows_and_columns[1]) if rows_and_columns else None
