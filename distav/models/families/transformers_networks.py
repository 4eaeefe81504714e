"""Networks of transformers by their model type: description, construction, weights and pooling.

A network is named `hf:REPOSITORY`, `hf:REPOSITORY@REVISION` or `hf:DIRECTORY`. Of networks of several modalities, such
as CLIP, CLAP and PE-AV, only the part for one of them is created. No code of a repository is executed.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from distav.config.errors import UserError
from distav.config.model import TowerConfig
from distav.models.layers import without_dropout
from distav.models.weights import missing_library, unavailable

PARTS = {"visual": ("video_config", "vision_config"), "audio": ("audio_config",)}
"""Names under which networks of several modalities have the settings of the part for one of them."""
RANDOM_PARTS = ("layerdrop", "apply_spec_augment", "drop_path_rate")
"""Settings of random parts of a network, whose random numbers would depend on the number of ranks, besides dropout."""
_KEY_MAPPINGS = {
    "clap_audio_model": {r"^audio_model\.": ""},
    "pe_audio_encoder": {r"^(.*\.)?audio_encoder\.": ""},
    "pe_video_encoder": {r"^(.*\.)?video_encoder\.": ""},
}
"""Changes of names in checkpoints of several modalities that transformers does not make itself."""
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError)
"""What transformers raises for files that are missing or that it cannot read."""
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
    transformers, (source, revision) = import_transformers(key, config.name), _source(config.name)
    try:
        with _quiet(transformers):
            settings = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
            stored, _ = transformers.PreTrainedConfig.get_config_dict(source, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise unavailable(key, config.name, error, _advice(source)) from None
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


def _restore_image_width(settings: Any, stored: dict[str, Any]) -> None:
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
    return _trim(_network_class(settings)(settings))


def download(config: TowerConfig, modality: str, description: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of the network that a tower names, by the names in the network of `build`.

    Raises:
        UserError: if they are neither in a directory or the cache of the hub, nor can be downloaded.
    """
    key = f"model.{modality}.name"
    transformers, (source, revision) = import_transformers(key, config.name), _source(config.name)
    settings = transformers.AutoConfig.for_model(**description["network"])
    try:
        with _quiet(transformers):
            net, loaded = _network_class(settings).from_pretrained(
                source,
                revision=revision,
                config=settings,
                dtype=torch.float32,
                weights_only=True,
                output_loading_info=True,
                key_mapping=_KEY_MAPPINGS.get(settings.model_type),
            )
    except LOAD_ERRORS as error:
        raise unavailable(key, config.name, error, _advice(source)) from None
    missing = set(loaded["missing_keys"])  # Transformers has given them random values.
    weights = {name: values for name, values in net.state_dict().items() if name not in missing}
    prefix = "encoder." if getattr(net.config, "is_encoder_decoder", False) else ""
    return {name.removeprefix(prefix): values for name, values in weights.items() if name.startswith(prefix)}


def load_checkpoint(key: str, name: str) -> tuple[Any, Any]:
    """Return the network of a checkpoint, with all its parts, and its tokenizer.

    Args:
        key: setting or option that names the checkpoint.
        name: `hf:` and a repository or directory.

    Raises:
        UserError: if either cannot be loaded, or the checkpoint lacks weights of the network.
    """
    if not name.startswith("hf:"):
        raise UserError(f"{key}={name}: allowed: hf:REPOSITORY, hf:REPOSITORY@REVISION or hf:DIRECTORY.")
    transformers, (source, revision) = import_transformers(key, name), _source(name)
    try:
        with _quiet(transformers):
            settings = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
            stored, _ = transformers.PreTrainedConfig.get_config_dict(source, revision=revision)
            _restore_image_width(settings, stored)
            network, loaded = transformers.AutoModel.from_pretrained(
                source, revision=revision, config=settings, dtype=torch.float32, weights_only=True,
                output_loading_info=True,
            )  # fmt: skip
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise unavailable(key, name, error, _advice(source)) from None
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"{key}={name}: the checkpoint lacks {len(missing)} weights of a network of type "
            f"{network.config.model_type}, such as {missing[0]}; download it again."
        )
    return network, tokenizer


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
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


def _network_class(settings: Any) -> Any:
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


def _source(name: str) -> tuple[str, str]:
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


def _advice(source: str) -> str:
    if Path(source).is_dir():
        return "Allowed: a directory with config.json and model.safetensors, as save_pretrained() writes it."
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        return "There is no such directory."
    return (
        f"Where there is a network, run: hf download {source}; the files are then in the cache of the hub, "
        "~/.cache/huggingface/hub, which can be copied. Or use hf:DIRECTORY with a directory that holds config.json "
        "and model.safetensors."
    )


def unsupported(modality: str, name: str, model_type: str, reason: str) -> UserError:
    """Return the error for a network that cannot be a tower."""
    return UserError(
        f"model.{modality}.name={name}: a network of type {model_type} {reason}; allowed: image, video and audio "
        "encoders of transformers."
    )
