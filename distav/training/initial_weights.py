"""Initial weights of a run: those of pretrained towers, and those of an exported network."""

from collections.abc import Mapping

from torch import Tensor, nn

from distav.config.errors import UserError, format_list
from distav.config.model import ModelConfig
from distav.models import lora
from distav.models.encoder import Encoder
from distav.models.pretrained import load_weights
from distav.models.towers import Tower
from distav.models.weights import COUNTER
from distav.training.metric_logger import MetricLogger

MIN_COVERAGE = 0.5
"""Fraction of the tensors of a network that its pretrained weights contain at least."""
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
                key = f"model.{modality}.name={config.name}"
                fitting = self._fitting(named, expected, own, key, source)
                self._check_coverage(fitting, named, prefix, tower.net, key, source)
                loaded |= fitting
            elif isinstance(tower, Tower) and config.freeze and not self.config.pretrained:
                self.logger.warn(
                    f"model.{modality}.freeze={config.freeze} freezes random weights of model.{modality}.name="
                    f"{config.name}; give pretrained ones by model.{modality}.weights, or remove the setting."
                )
        if self.config.pretrained:
            loaded |= self._exported(own)
        return loaded

    def _fitting(
        self, weights: Mapping[str, Tensor], expected: list[str], own: Mapping[str, Tensor], key: str, source: str
    ) -> dict[str, Tensor]:
        """Return the weights that fit, and log which are missing, unexpected or of another shape."""
        weights = {name: values for name, values in weights.items() if not name.endswith(COUNTER)}
        fitting = {name: values for name, values in weights.items() if name in own and own[name].shape == values.shape}
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

    def _check_coverage(
        self,
        fitting: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        prefix: str,
        net: Encoder,
        key: str,
        source: str,
    ) -> None:
        """Raise a UserError unless most tensors of the network without its pooling over frames are initialized."""
        (backbone,) = (name for name, module in net.named_modules() if module is net.backbone)
        prefix = f"{prefix}{backbone}." if backbone else prefix
        own = [prefix + name for name in net.backbone.state_dict() if ".lora_" not in name]
        if len(fitting) < MIN_COVERAGE * len(own):
            missing, unexpected = sorted(set(own) - set(fitting)), sorted(set(weights) - set(fitting))
            raise UserError(
                f"{key}: {len(fitting)} of the {len(own)} tensors of this network are among the weights of {source}, "
                f"at least half of them are needed; missing are {_listed(missing)}; others are {_listed(unexpected)}. "
                f"Give weights of this network, or set model.{prefix.split('.')[0]}.weights=none for random ones."
            )

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
