"""A published scaling table of a contrastive training, and the two constants that are fitted to it.

Source: LAION, "CLAP HTSAT Multi-Node Scaling Benchmark", https://github.com/LAION-AI/open-clap-scaling. Audio and text
are matched within the batch, with data-parallel training on nodes of four GH200 GPUs (the JUPITER computer).
Legend: W GPUs, b samples of a GPU, D embedding dimension.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from tools.bench.scaling.network import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Link, Network
from tools.bench.scaling.step_time import expected_maximum

GPUS = (4, 8, 16, 32, 64, 128, 256, 512)
GPUS_PER_NODE = 4
NVLINK_BYTES_PER_S, NETWORK_BYTES_PER_S = 450e9, 25e9
"""Nominal bandwidth of a GPU inside its node (NVLink 4) and of its network adapter (InfiniBand NDR200)."""
EMBED_DIM = 512
HIDDEN_FRACTION = 0.9
"""Part of the gradients that is reduced during the backward pass, in buckets; the last buckets are not hidden."""


@dataclass(frozen=True)
class PublishedModel:
    """A row of the table for each number of GPUs.

    Attributes:
        samples: b.
        forward_flop: operations of a forward pass of one sample, as published.
        parameters: parameters of both networks, counted in `transformers.ClapModel`; not in the published table.
        samples_per_s: published samples per second and GPU, for each of `GPUS`.
    """

    samples: int
    forward_flop: float
    parameters: float
    samples_per_s: tuple[float, ...]

    @property
    def efficiency(self) -> np.ndarray:
        """Samples per second and GPU, relative to the first row."""
        return np.array(self.samples_per_s) / self.samples_per_s[0]


TABLE = {
    "HTSAT-tiny, RoBERTa-base": PublishedModel(
        616, 111.20e9, 153.5e6, (623.7, 620.7, 616.5, 611.6, 601.8, 586.0, 573.3, 544.6)
    ),
    "HTSAT-base, RoBERTa-base": PublishedModel(
        416, 130.09e9, 193.9e6, (538.2, 530.5, 523.7, 521.9, 507.8, 505.4, 485.3, 454.8)
    ),
}


@dataclass(frozen=True)
class FittedConstants:
    """The constants that are fitted to the table.

    Attributes:
        network_fraction: fraction of the nominal bandwidth between nodes that collectives reach.
        jitter: standard deviation of the compute time of a GPU in a step, relative to its mean.
    """

    network_fraction: float
    jitter: float


def predicted_efficiency(model: PublishedModel, constants: FittedConstants, gpus: Sequence[int] = GPUS) -> np.ndarray:
    """Return the predicted samples per second and GPU for each number of GPUs, relative to those of one node.

    The compute time is chosen such that the prediction for one node equals the published one. Its other terms are the
    similarities of b samples with all W b (12 b^2 W D operations, at the rate of the network), features that are
    gathered in float32 and their gradients, and the reduction of float32 gradients, which the backward pass hides
    except for the last buckets.
    """
    node = model.samples / model.samples_per_s[0]
    rate = 3 * model.forward_flop * model.samples_per_s[0]

    def other(world_size: int) -> float:
        similarities = 12 * model.samples**2 * world_size * EMBED_DIM / rate
        return similarities + _exchange_s(model, constants, world_size, 2 / 3 * node)

    alone = (node - other(GPUS_PER_NODE)) / (1 + constants.jitter * expected_maximum(GPUS_PER_NODE))
    steps = [alone * (1 + constants.jitter * expected_maximum(number)) + other(number) for number in gpus]
    return node / np.array(steps)


def _exchange_s(model: PublishedModel, constants: FittedConstants, world_size: int, backward_s: float) -> float:
    """Return the seconds of the collectives of a step that computation does not hide."""
    network = Network(
        GPUS_PER_NODE,
        Link(0.6e-6, 0.8 * NVLINK_BYTES_PER_S, 0.6e-6),
        Link(2.7e-6, constants.network_fraction * NETWORK_BYTES_PER_S, 5e-6),
    )
    features = world_size * model.samples * 2 * EMBED_DIM * 4
    exchange = sum(network.seconds(kind, features, world_size) for kind in (ALL_GATHER, REDUCE_SCATTER))
    reduction = network.seconds(ALL_REDUCE, 4 * model.parameters, world_size)
    hidden = min(HIDDEN_FRACTION * reduction, backward_s)
    return exchange + reduction - hidden


def fit(names: Sequence[str] = tuple(TABLE), largest: int = max(GPUS)) -> FittedConstants:
    """Fit the two constants to the efficiencies of models, by least squares.

    Args:
        names: models, keys of `TABLE`.
        largest: largest number of GPUs whose rows are used.
    """
    gpus = [number for number in GPUS if number <= largest]

    def residuals(values: np.ndarray) -> np.ndarray:
        constants = FittedConstants(float(values[0]), float(values[1]))
        return np.concatenate(
            [predicted_efficiency(TABLE[name], constants, gpus) - TABLE[name].efficiency[: len(gpus)] for name in names]
        )

    fitted = least_squares(residuals, [0.5, 0.01], bounds=([0.01, 0.0], [1.0, 0.2]), x_scale=[0.1, 0.01])
    return FittedConstants(float(fitted.x[0]), float(fitted.x[1]))


def errors(constants: FittedConstants) -> dict[str, np.ndarray]:
    """Return predicted minus published efficiency in percentage points, for each model and each of `GPUS`."""
    return {name: 100 * (predicted_efficiency(model, constants) - model.efficiency) for name, model in TABLE.items()}


def record(constants: FittedConstants) -> dict[str, Any]:
    """Return the table, the predictions and the fitted constants as a JSON object, with those of partial fits."""
    first, second = TABLE
    partial = {
        f"fitted to {first} alone": fit([first]),
        f"fitted to {second} alone": fit([second]),
        "fitted to 4 to 128 GPUs": fit(largest=128),
    }
    return {
        "constants": asdict(constants),
        "rows": [
            {
                "model": name,
                "gpus": list(GPUS),
                "published": [100 * float(value) for value in model.efficiency],
                "errors": [float(error) for error in errors(constants)[name]],
            }
            for name, model in TABLE.items()
        ],
        "partial": [
            {
                "fit": name,
                **asdict(other),
                "largest_error": max(float(abs(values).max()) for values in errors(other).values()),
            }
            for name, other in partial.items()
        ],
    }
