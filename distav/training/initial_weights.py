"""Initial weights of a run: those of pretrained towers, and those of an exported network."""

from collections.abc import Mapping

from torch import Tensor, nn

from distav.config.errors import UserError, format_list
from distav.config.model import ModelConfig
from distav.models import lora
from distav.models.pretrained import load_weights
from distav.models.towers import Tower
from distav.models.weights import COUNTER
from distav.training.metric_logger import MetricLogger

MAX_LISTED = 8
"""Largest number of names in a message; the remaining ones are counted."""


class InitialWeights:
    """Reads the weights that a new network starts with, and reports which of them fit.

    Weights of `model.pretrained` replace those of the towers.

    Attributes:
        has_sources: whether any weights are not random.
    """

    def __init__(self, config: ModelConfig, logger: MetricLogger):
        self.config, self.logger = config, logger
        named = (tower.architecture or tower.weights for tower in (config.visual, config.audio))
        self.has_sources = bool(config.pretrained) or any(named)

    def __call__(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the weights by their names in the state dict of a model; each has the shape that the model has.

        Raises:
            UserError: if a source cannot be read, or none of its weights fits.
        """
        own = model.state_dict()
        loaded: dict[str, Tensor] = {}
        for modality, config in (("visual", self.config.visual), ("audio", self.config.audio)):
            tower = getattr(model, modality, None)
            if isinstance(tower, Tower) and (weights := tower.net.initial_weights(config)):
                prefix = f"{modality}.net."
                expected = [name for name in own if name.startswith(prefix)]
                named = lora.to_adapted_names({prefix + name: values for name, values in weights.items()}, own)
                source = config.weights or config.name
                loaded |= self._fitting(named, expected, own, f"model.{modality}.name={config.name}", source)
        if self.config.pretrained:
            loaded |= self._exported(own)
        return loaded

    def _fitting(
        self, weights: Mapping[str, Tensor], expected: list[str], own: Mapping[str, Tensor], key: str, source: str
    ) -> dict[str, Tensor]:
        """Return the weights that fit, and log which are missing, unexpected or of another shape."""
        weights = {name: values for name, values in weights.items() if not name.endswith(COUNTER)}
        fitting = {name: values for name, values in weights.items() if name in own and own[name].shape == values.shape}
        if not fitting:
            raise UserError(f"{key}: none of the {len(weights)} weights of {source} fits this network.")
        expected = [name for name in expected if ".lora_A." not in name and ".lora_B." not in name]
        differences = {
            "missing": [name for name in expected if name not in weights],
            "unexpected": [name for name in weights if name not in own],
            "of another shape": [name for name in weights if name in own and name not in fitting],
        }
        self.logger.info(f"{key}: {len(fitting)} of {len(expected)} tensors initialized from {source}")
        for kind, names in differences.items():
            if names:
                self.logger.info(f"{key}: {len(names)} tensors {kind}: {_listed(names)}")
        return fitting

    def _exported(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        source = self.config.pretrained
        try:
            weights = load_weights(source)
        except UserError as error:
            raise UserError(f"model.pretrained={source}: {error}") from None
        weights = lora.to_adapted_names(weights, own)
        fitting = {name: values for name, values in weights.items() if name in own and own[name].shape == values.shape}
        if not fitting:
            raise UserError(
                f"model.pretrained={source}: none of its weights fits this network; use its `model` settings."
            )
        skipped = sorted({name.split(".")[0] for name in set(weights) - set(fitting)})
        self.logger.info(f"initialized from {source}" + (f", except {format_list(skipped)}" if skipped else ""))
        return fitting


def _listed(names: list[str]) -> str:
    rest = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")
