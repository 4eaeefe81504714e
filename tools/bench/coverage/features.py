"""Features of a modality from a mixture of groups with heavy tails.

Legend: N samples, T classes including those of open-set samples, G groups of a class, D rank, E feature width,
S sources.
"""

from dataclasses import dataclass

import numpy as np

from tools.bench.coverage.problem import ModalityModel

OUTLIER_SCALE = 4.0
"""Noise of an outlier relative to that of other samples."""
DUPLICATE_NOISE = 0.15
"""Noise between the samples of a source, relative to the noise between sources."""
AMBIENT_NOISE = 0.15
"""Standard deviation of the noise in all E dimensions, relative to the noise in the subspace of the mixture."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Centers and noise of the groups of all classes.

    Attributes:
        centers: [T, G, D].
        noise: [T, G] standard deviation of the noise.
        spectrum: [D] relative standard deviation of the noise in each dimension.
        projection: [D, E] orthonormal rows.
        offset: [E] mean of all features.
    """

    centers: np.ndarray
    noise: np.ndarray
    spectrum: np.ndarray
    projection: np.ndarray
    offset: np.ndarray

    def class_distances(self, points: np.ndarray, num_classes: int) -> np.ndarray:
        """Return the squared distance of points to the nearest group of each of the first C classes.

        Args:
            points: [N, D].
            num_classes: C.

        Returns:
            [N, C], in units of the noise variance.
        """
        squared = (points**2).sum(1)[:, None]
        distances = np.full((len(points), num_classes), np.inf)
        for group in range(self.centers.shape[1]):
            centers = self.centers[:num_classes, group]
            to_group = squared - 2 * points @ centers.T + (centers**2).sum(1)
            distances = np.minimum(distances, to_group / self.noise[:num_classes, group] ** 2)
        return distances


def draw_mixture(model: ModalityModel, num_classes: int, rng: np.random.Generator) -> Mixture:
    """Draw the centers and the noise of the groups of T classes."""
    rank, groups = model.rank, model.num_groups
    class_centers = rng.standard_normal((num_classes, 1, rank))
    group_offsets = rng.standard_normal((num_classes, groups, rank))
    centers = np.sqrt(1 - model.group_spread) * class_centers + np.sqrt(model.group_spread) * group_offsets
    class_scale = np.exp(model.variation * rng.standard_normal((num_classes, 1, 1)))
    # Otherwise the noise would reveal the class.
    noise_variation = model.variation if model.separability > 0 else 0.0
    spectrum = rng.permutation(np.arange(1, rank + 1) ** -0.3)
    # Orthonormal rows of width E.
    projection = np.linalg.qr(rng.standard_normal((model.width, rank)))[0].T
    return Mixture(
        centers=model.separability / np.sqrt(2 * rank) * class_scale * centers,
        noise=np.exp(noise_variation * rng.standard_normal((num_classes, groups))),
        spectrum=spectrum / np.sqrt((spectrum**2).mean()),
        projection=projection,
        offset=rng.standard_normal(model.width),
    )


def draw_points(
    model: ModalityModel,
    mixture: Mixture,
    classes: np.ndarray,
    groups: np.ndarray,
    sources: np.ndarray,
    outlier_rate: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw points in the subspace of the mixture.

    Args:
        model: distribution.
        mixture: its groups.
        classes, groups: [S] class and group of each source.
        sources: [N] source of each sample.
        outlier_rate: fraction of outliers.
        rng: source of randomness.

    Returns:
        [N, D] points.
    """
    freedom = model.degrees_of_freedom
    scale = np.sqrt(freedom / rng.chisquare(freedom, len(classes)) * (freedom - 2) / freedom)
    scale *= np.where(rng.random(len(classes)) < outlier_rate, OUTLIER_SCALE, 1.0)
    scale *= mixture.noise[classes, groups]
    noise = scale[:, None] * mixture.spectrum * rng.standard_normal((len(classes), model.rank))
    points = (mixture.centers[classes, groups] + noise)[sources]
    if len(classes) < len(sources):
        points += DUPLICATE_NOISE * rng.standard_normal(points.shape)
    return points


def embed(mixture: Mixture, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the features of points, with noise in all dimensions: [N, D] -> [N, E] float32."""
    features = points @ mixture.projection + mixture.offset
    return (features + AMBIENT_NOISE * rng.standard_normal(features.shape)).astype(np.float32)
