"""The hybrid attention network for audio-visual event parsing (HAN, Tian et al. 2020; sizes: VALOR, Lai et al. 2023).

Legend: B videos, T segments, E width, C classes, S steps of a feature stream.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distav.config.model import ParserConfig
from distav.data.modalities import FeatureStream
from distav.models.input_checks import check_seeds, check_stream
from distav.models.layers import SeededDropout

_DROPOUT_STREAM = 100
"""First stream of a sample's random numbers for the dropout of this network."""


class TokenSpec(NamedTuple):
    """Shape of a feature stream: a sequence of vectors, or a grid of tokens.

    Attributes:
        name: name of the stream in the dataset.
        dim: width of a vector.
        grid: rows and columns of a token grid, such as (2, 32) of CLAP; None for a sequence.
    """

    name: str
    dim: int
    grid: tuple[int, int] | None = None


class Parsed(NamedTuple):
    """Predicted events of videos; axis 1 is in the order of `distav.data.modalities.MODALITIES`.

    Attributes:
        segments: [B, 2, T, C] logits of each class in each modality and segment.
        video: [B, C] probability that the class occurs.
        modality: [B, 2, C] probability that the class occurs in the modality.
    """

    segments: Tensor
    video: Tensor
    modality: Tensor


class SegmentEmbedding(nn.Module):
    """Embeddings of T segments from all streams of one modality; each stream is projected and averaged over steps."""

    _GRID_STEPS = 1024

    def __init__(self, streams: Sequence[TokenSpec], width: int, segments: int):
        super().__init__()
        self.streams, self.segments = tuple(streams), segments
        self.project = nn.ModuleList(nn.Linear(stream.dim, width) for stream in streams)
        self.join = nn.Linear(width * len(streams), width) if len(streams) > 1 else nn.Identity()

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Embed all streams, each [B, S, dim], to [B, T, E]."""
        embedded = [
            self._embed(stream, project, values)
            for stream, project, values in zip(self.streams, self.project, features, strict=True)
        ]
        return self.join(torch.cat(embedded, dim=2))

    def _embed(self, stream: TokenSpec, project: nn.Module, values: Tensor) -> Tensor:
        if stream.grid is None:
            steps = project(values)
        else:  # VALOR++: the grid is interpolated in time, projected, and averaged over its rows.
            rows, columns = stream.grid
            grid = values.transpose(1, 2).unflatten(2, (rows, columns))
            grid = F.interpolate(grid.float(), (rows, self._GRID_STEPS), mode="bicubic").to(values.dtype)
            steps = project(grid.permute(0, 2, 3, 1)).mean(dim=1)
        return F.adaptive_avg_pool1d(steps.transpose(1, 2), self.segments).transpose(1, 2)


class _ZeroBiasLinear(nn.Linear):
    """A linear layer with a bias that is initialized to zero."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Multi-head attention with dropout that depends on each sample's seed.

    The weights of queries, keys and values belong to this module and not to a layer inside it, since ZeRO-3 gathers the
    parameters of the module whose forward pass runs. They are initialized in the constructor, since ZeRO-3 partitions
    them at its end.
    """

    def __init__(self, width: int, heads: int, dropout: float, stream: int):
        super().__init__()
        self.heads = heads
        self.project_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.project_bias = nn.Parameter(torch.zeros(3 * width))
        self.out = _ZeroBiasLinear(width, width)
        self.drop = SeededDropout(dropout, stream)

    def forward(self, queries: Tensor, keys: Tensor, seeds: Tensor) -> Tensor:
        """Let queries [B, T, E] attend to keys [B, T, E]."""
        width = queries.shape[2]
        projected_queries = F.linear(queries, self.project_weight, self.project_bias)
        projected_keys = F.linear(keys, self.project_weight, self.project_bias)
        q = self._split_heads(projected_queries[..., :width])
        k = self._split_heads(projected_keys[..., width : 2 * width])
        v = self._split_heads(projected_keys[..., 2 * width :])
        weights = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)
        weights = self.drop(weights.flatten(1), seeds).view_as(weights)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def _split_heads(self, values: Tensor) -> Tensor:
        return values.unflatten(2, (self.heads, -1)).transpose(1, 2)


class HybridLayer(nn.Module):
    """Self-attention within one modality plus cross-attention to the other, and a feed-forward network.

    Both modalities use the same weights.
    """

    def __init__(self, width: int, heads: int, ffn_dim: int, dropout: float, index: int):
        super().__init__()
        first_stream = _DROPOUT_STREAM + 10 * index
        self.self_attention = Attention(width, heads, dropout, first_stream)
        self.cross_attention = Attention(width, heads, dropout, first_stream + 1)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.linear1, self.linear2 = nn.Linear(width, ffn_dim), nn.Linear(ffn_dim, width)
        self.drops = nn.ModuleList(SeededDropout(dropout, first_stream + 2 + offset) for offset in range(4))

    def forward(self, x: Tensor, other: Tensor, seeds: Tensor) -> Tensor:
        """Update a modality [B, T, E] with itself and the other [B, T, E]; each sum is followed by a normalization."""
        cross_attended, self_attended = self.cross_attention(x, other, seeds), self.self_attention(x, x, seeds)
        x = self.norms[0](x + self._drop(0, cross_attended, seeds) + self._drop(1, self_attended, seeds))
        hidden = self._drop(2, F.relu(self.linear1(x)), seeds)
        return self.norms[1](x + self._drop(3, self.linear2(hidden), seeds))

    def _drop(self, index: int, values: Tensor, seeds: Tensor) -> Tensor:
        return self.drops[index](values.flatten(1), seeds).view_as(values)


class AttentivePooling(nn.Module):
    """Segment probabilities, pooled over time and modalities with learned weights.

    As published, weights are normalized over time in each modality and over modalities in each segment. The sum of
    their products lies between 0 and 2, and probabilities are clamped to 1. With `joint`, one softmax over time and
    modalities normalizes the weights, and nothing is clamped.
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
        time_logits, modality_logits = self.weigh_time(embedded).float(), self.weigh_modality(embedded).float()
        probs, time_weights = segments.sigmoid(), time_logits.softmax(dim=2)
        if self.joint:
            weights = (time_logits + modality_logits).flatten(1, 2).softmax(dim=1).view_as(probs)
        else:
            weights = time_weights * modality_logits.softmax(dim=1)
        video = (weights * probs).sum(dim=(1, 2)).clamp(self._EDGE, 1 - self._EDGE)
        modality = (time_weights * probs).sum(dim=2).clamp(self._EDGE, 1 - self._EDGE)
        return Parsed(segments, video, modality)


class EventParser(nn.Module):
    """Segment embeddings, layers of hybrid attention, attentive pooling.

    With `sequential_update`, as in the code of VALOR, visual segments attend to the audio segments that the same layer
    has updated. Otherwise, as in HAN, both modalities attend to the inputs of the layer.
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
        self.layers = nn.ModuleList(HybridLayer(width, heads, ffn_dim, dropout, index) for index in range(depth))
        self.pool = AttentivePooling(width, num_classes, joint_pooling)
        self.sequential_update = sequential_update

    def forward(self, audio: Sequence[Tensor], visual: Sequence[Tensor], seeds: Tensor) -> Parsed:
        """Parse videos.

        Args:
            audio, visual: [B, S, dim] features of each stream.
            seeds: [B] int64, seeds of dropout.
        """
        audio_segments, visual_segments = self.embed_audio(audio), self.embed_visual(visual)
        for layer in self.layers:
            updated_audio = layer(audio_segments, visual_segments, seeds)
            keys = updated_audio if self.sequential_update else audio_segments
            visual_segments = layer(visual_segments, keys, seeds)
            audio_segments = updated_audio
        return self.pool(torch.stack([audio_segments, visual_segments], dim=1))


def build_parser(
    config: ParserConfig, audio: Sequence[TokenSpec], visual: Sequence[TokenSpec], num_classes: int, segments: int
) -> EventParser:
    """Return the event parser that the configuration describes."""
    return EventParser(
        audio,
        visual,
        num_classes,
        segments=segments,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        ffn_dim=config.ffn_dim,
        dropout=config.dropout,
        sequential_update=config.sequential_update,
        joint_pooling=config.joint_pooling,
    )


class FeatureParser(nn.Module):
    """The event parser on datasets that store features and not clips."""

    def __init__(self, config: ParserConfig, streams: Mapping[str, FeatureStream], segments: int, num_classes: int):
        super().__init__()
        self.segments = segments
        self.audio_streams = _token_specs(config, streams, "audio")
        self.visual_streams = _token_specs(config, streams, "visual")
        self.parse = build_parser(config, self.audio_streams, self.visual_streams, num_classes, segments)

    def forward(self, seeds: Tensor, parse: bool = True, **features: Tensor) -> dict[str, Tensor]:
        """Parse events.

        Args:
            seeds: [B] int64, seeds of dropout.
            parse: accepted since `AVModel` has it; this network always parses.
            features: [B, steps, dim] by name of the stream.

        Returns:
            The fields of `Parsed`.

        Raises:
            ValueError: for a missing stream, or an input of another type or shape.
        """
        check_seeds(seeds)
        for stream in (*self.audio_streams, *self.visual_streams):
            num_steps = stream.grid and stream.grid[0] * stream.grid[1]
            check_stream(stream.name, features.get(stream.name), len(seeds), stream.dim, num_steps)
        dtype = next(self.parameters()).dtype
        audio = [features[stream.name].to(dtype) for stream in self.audio_streams]
        visual = [features[stream.name].to(dtype) for stream in self.visual_streams]
        return self.parse(audio, visual, seeds)._asdict()


def _token_specs(config: ParserConfig, streams: Mapping[str, FeatureStream], modality: str) -> list[TokenSpec]:
    """Return the shapes of all streams of a modality."""
    specs: list[TokenSpec] = []
    for name, stream in streams.items():
        if stream.modality == modality:
            grid = config.token_grids.get(name)
            specs.append(TokenSpec(name, stream.dim, (grid[0], grid[1]) if grid else None))
    return specs
