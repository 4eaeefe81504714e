"""A small network under DeepSpeed, for tests of the engine."""

import torch
from torch import Tensor, nn

from distav.config.schema import Config, Precision
from distav.data.pipeline.loader import Batch
from distav.distributed.process_group import World
from distav.training.engine.deepspeed_engine import Engine

CPU = World(0, 1, 0, torch.device("cpu"))


class ChainNet(nn.Module):
    """A chain of linear layers."""

    def __init__(self, depth: int):
        super().__init__()
        self.visual = nn.Sequential(*[nn.Linear(5, 5) for _ in range(depth)])
        self.classify = nn.Linear(5, 3)

    def forward(self, frames: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        return {"logits": self.classify(self.visual(frames.to(self.classify.weight.dtype)))}


def new_engine(stage: int | None, precision: str, depth: int, world: World = CPU) -> Engine:
    """Return an engine with a chain of `depth` layers and a head."""
    settings = Config()
    settings.deepspeed.zero_stage, settings.deepspeed.precision = stage, Precision[precision]
    settings.optim.global_batch = 4
    return Engine(lambda: ChainNet(depth), settings, world)


def media_batch(**media: Tensor) -> Batch:
    """Return a batch with media alone."""
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(none, none.bool(), {}, none, media)


def step(engine: Engine, scale: float = 1.0) -> Tensor:
    """Do one step on a constant batch with a scaled loss; returns the gradient norm."""
    frames = torch.ones(4, 5, device=next(engine.model.parameters()).device)
    outputs = engine(media_batch(frames=frames))
    engine.backward(scale * outputs["logits"].float().square().mean())
    return engine.step()
