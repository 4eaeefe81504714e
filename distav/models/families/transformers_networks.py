"""Networks of transformers by their model type: description, construction and pooling.

A network is named `hf:REPOSITORY`, `hf:REPOSITORY@REVISION` or `hf:DIRECTORY`. Of networks of several modalities, such
as CLIP, CLAP and PE-AV, only the part for one of them is created. No code of a repository is executed.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distav.config.errors import UserError
from distav.config.model import TowerConfig
from distav.models.layers import without_dropout
from distav.models.weights import missing_library, unavailable

PARTS = {"visual": ("video_config", "vision_config"), "audio": ("audio_config",)}
"""Names under which networks of several modalities have the settings of the part for one of them."""
RANDOM_PARTS = ("layerdrop", "apply_spec_augment", "drop_path_rate")
"""Settings of random parts of a network, whose random numbers would depend on the number of ranks, besides dropout."""
_PREPROCESSOR_FILES = {
    "visual": ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json"),
    "audio": ("preprocessor_config.json", "processor_config.json"),
}
_PROCESSOR_PARTS = {"visual": ("video_processor", "image_processor"), "audio": ("feature_extractor",)}
"""Keys of `processor_config.json` with the settings for one modality."""


def describe(config: TowerConfig, modality: str) -> dict[str, Any]:
    """Return the settings of network and preprocessor, and the source of the weights.

    Args:
        config: settings of the tower.
        modality: visual or audio.

    Raises:
        UserError: if transformers is missing, or the settings cannot be read.
    """
    key = f"model.{modality}.name"
    transformers, (source, revision) = import_transformers(key, config.name), source_of(config.name)
    try:
        with quiet(transformers):
            settings = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
            stored, _ = transformers.PreTrainedConfig.get_config_dict(source, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise unavailable(key, config.name, error, advice(source)) from None
    settings = _part(settings, modality)
    values = settings.to_dict() | {"model_type": settings.model_type}
    if settings.model_type == "pe_video_encoder":
        values["vision_config"]["num_labels"] = _num_image_features(stored)
    _remove_randomness(values)
    return {
        "network": values,
        "preprocessor": _preprocessor(transformers, source, revision, modality),
        "source": config.weights or source,
        "license": "see the source",
    }


def _part(settings: Any, modality: str) -> Any:
    """Return the settings of the part for one modality; those of a network for one modality are returned as is."""
    settings = getattr(settings, "audio_video_config", None) or settings
    if settings.model_type == "pe_video_encoder":  # Its `vision_config` is one of its layers.
        return settings
    part = next((part for name in PARTS[modality] if (part := getattr(settings, name, None))), settings)
    return getattr(part, "video_config", part) if part.model_type == "pe_video" else part


def restore_image_width(settings: Any, stored: dict[str, Any]) -> None:
    """Set the width of the image features in the settings of a checkpoint of PE-AV; leave all others as they are."""
    settings = getattr(settings, "audio_video_config", None) or settings
    video = getattr(settings, "video_config", None)
    if video is not None and video.model_type == "pe_video_encoder":
        video.vision_config.num_labels = _num_image_features(stored)


def _num_image_features(stored: dict[str, Any]) -> int:
    """Return the width of the image features in PE-AV's `config.json`, which its configuration class does not read."""
    for name in ("audio_video_config", "video_config", "vision_config"):
        stored = stored.get(name, stored)
    names = stored.get("label_names") or stored.get("id2label") or ()
    return int(stored.get("num_labels") or len(names) or stored.get("num_classes", 1024))


def build(description: dict[str, Any], **options: Any) -> nn.Module:
    """Return a network with random weights; options replace its settings."""
    import transformers

    settings = transformers.AutoConfig.for_model(**{**description["network"], **options})
    return _trim(network_class(settings)(settings))


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Suppress messages of transformers, such as its report on weights, which lists those of other modalities."""
    logging = transformers.utils.logging
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()


def pooled(outputs: Any, net: Any) -> Tensor:
    """Return the features of clips from the outputs of a network: its pooled output, class token, or mean over tokens.

    Returns:
        [B, E], for B images, videos or clips of audio.
    """
    if getattr(outputs, "pooler_output", None) is not None:
        return outputs.pooler_output.flatten(1)
    tokens = outputs.last_hidden_state
    if tokens.dim() == 4:  # [B, E, H, W]
        return tokens.mean((2, 3))
    has_class_token = any(name.endswith("cls_token") for name, _ in net.named_parameters())
    return tokens[:, 0] if has_class_token else tokens.mean(1)


def feature_dim(settings: dict[str, Any], net: Any) -> int:
    """Return the width of the features."""
    hidden = settings.get("hidden_sizes") or settings.get("embed_dims")
    if hidden and "hidden_size" not in settings:
        return int(hidden[-1])
    return int(getattr(net.config, "hidden_size", 0) or net.config.d_model)


def _trim(net: Any) -> nn.Module:
    """Return the network without parts that do not contribute to its features."""
    if getattr(net.config, "is_encoder_decoder", False):
        net = net.get_encoder()
    pooler = getattr(net, "pooler", None)
    if pooler is not None and isinstance(getattr(pooler, "dense", None), nn.Linear):
        net.pooler = None  # Most checkpoints have no weights for it.
    return without_dropout(net)


def network_class(settings: Any) -> Any:
    """Return the class of the networks with the given settings."""
    import transformers

    if type(settings) is transformers.ClapAudioConfig:  # The only part that the table of transformers lacks.
        return transformers.ClapAudioModel
    return transformers.MODEL_MAPPING[type(settings)]


def _remove_randomness(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            _remove_randomness(value)
        elif isinstance(value, int | float) and (
            name in RANDOM_PARTS or "dropout" in name or name.endswith(("drop_prob", "dropout_prob"))
        ):
            values[name] = type(value)(0)


def _preprocessor(transformers: Any, source: str, revision: str, modality: str) -> dict[str, Any]:
    """Return the settings of the preprocessor for a modality; empty if the repository has none."""
    for name in _PREPROCESSOR_FILES[modality]:
        try:
            path = transformers.utils.cached_file(
                source, name, revision=revision, _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )  # fmt: skip
        except OSError:
            continue
        if path:
            settings = json.loads(Path(path).read_text())
            return next((settings[part] for part in _PROCESSOR_PARTS[modality] if part in settings), settings)
    return {}


def source_of(name: str) -> tuple[str, str]:
    """Return repository or directory, and revision, of a name with the prefix `hf:`."""
    name = name.partition(":")[2]
    directory = Path(name).expanduser()
    if directory.is_dir():
        return str(directory), "main"
    repository, _, revision = name.partition("@")
    return repository, revision or "main"


def import_transformers(key: str, name: str) -> Any:
    """Return the module `transformers`, or raise a UserError if it is not installed.

    Args:
        key: setting or option that names a network.
        name: its value.
    """
    try:
        import transformers
    except ImportError:
        raise missing_library(key, name, "transformers") from None
    return transformers


def advice(source: str) -> str:
    """Return what to do if a repository or directory cannot be read."""
    if Path(source).is_dir():
        return "Allowed: a directory with config.json and model.safetensors, as save_pretrained() writes it."
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        return "There is no such directory."
    return (
        f"Where there is a network, run: hf download {source}; the files are then in the cache of the hub, "
        "~/.cache/huggingface/hub, which can be copied (HF_HUB_OFFLINE=1 searches nothing else). Or use hf:DIRECTORY "
        "with a directory that holds config.json and model.safetensors."
    )


def check_argument(modality: str, name: str, description: dict[str, Any], allowed: Sequence[str]) -> None:
    """Raise a UserError unless a network takes clips of a modality.

    Args:
        modality: visual or audio.
        name: name of the network.
        description: result of `describe`.
        allowed: names of the arguments that take such clips.
    """
    import transformers

    argument = network_class(transformers.AutoConfig.for_model(**description["network"])).main_input_name
    if argument not in allowed:
        raise UserError(
            f"model.{modality}.name={name}: a network of type {description['network']['model_type']} takes {argument}; "
            f"allowed: networks of transformers that take {' or '.join(allowed)}."
        )
