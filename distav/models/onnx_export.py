"""Exported encoders as ONNX files, which other programs run without Python.

Legend: B clips, T frames, H W pixels, N audio samples, E feature width, D embedding width.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distav.config.errors import UserError, did_you_mean, format_list
from distav.models.av_model import AVModel
from distav.models.pretrained import load_encoders

INPUTS = {"visual": "frames", "audio": "audio"}
"""Name of the input by modality."""
OUTPUTS = ("features", "embedding")
"""Names of the outputs."""
TOLERANCE = 1e-4
"""Largest difference of an output from that of PyTorch, absolute or relative to the largest value."""
_MAX_REASON = 300
"""Largest number of characters of another library's message in an error."""
_MAX_FILE_BYTES = 2**31 - 2**24
"""Size of the weights from which they are stored in a second file: files of ONNX are limited to 2 GiB."""


class _EmbeddingTower(nn.Module):
    """A tower with its projection: features [B, E] and unit vectors [B, D]."""

    def __init__(self, model: AVModel, modality: str):
        super().__init__()
        self.tower = model.visual if modality == "visual" else model.audio
        self.project = model.project_visual if modality == "visual" else model.project_audio

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Embed frames [B, T, H, W, 3] uint8 or audio [B, N] float32."""
        features = self.tower(clips)
        return features, self.project(features)


def export_onnx(
    location: str | Path, out_folder: str | Path, modalities: Sequence[str] = ("visual", "audio")
) -> dict[str, float]:
    """Write the encoders of an export as `visual.onnx` and `audio.onnx`, and check them with onnxruntime.

    The preprocessing is inside. The input `frames` [B, T, H, W, 3] is uint8, the input `audio` [B, N] float32 in
    [-1, 1], with any number B of clips of the shape that the network was trained with. The outputs are `features`
    [B, E], those of the tower, and `embedding` [B, D], unit vectors that are comparable between the modalities. The
    metadata entry `distav` has the input format in JSON.

    Args:
        location: an `export/` directory, or `hf://USER/NAME` or `hf://USER/NAME@REVISION` on the Hugging Face hub.
        out_folder: directory for the files.
        modalities: `visual`, `audio` or both.

    Returns:
        The largest absolute difference of the outputs from those of PyTorch, by modality; at most 1e-4 times the
        largest value of an output, or 1e-4.

    Raises:
        UserError: if there is no export of encoders, onnx, onnxscript or onnxruntime is missing, or ONNX cannot express
            a tower.
    """
    modalities = [modalities] if isinstance(modalities, str) else list(dict.fromkeys(modalities))
    for modality in modalities:
        if modality not in INPUTS:
            suggestion = did_you_mean(modality, INPUTS)
            raise UserError(f"modalities={modality}: allowed: {format_list(INPUTS)}.{suggestion}")
    if not modalities:
        raise UserError(f"modalities is empty; allowed: {format_list(INPUTS)}, or both.")
    _check_libraries()
    model, description = load_encoders(location)
    folder = Path(out_folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: not a directory that can be written to ({error.strerror}).") from None
    return {modality: _export_tower(model, description, modality, folder) for modality in modalities}


def _export_tower(model: AVModel, description: dict[str, Any], modality: str, folder: Path) -> float:
    net = _EmbeddingTower(model, modality).eval()
    name, path = f"{modality} tower {description['model'][modality]['name']}", folder / f"{modality}.onnx"
    clips = _example_clips(modality, description["input"])
    size = sum(values.numel() * values.element_size() for values in net.state_dict().values())
    with torch.no_grad():
        net(clips)  # Tables that are computed once become constants.
        try:
            with _quiet():
                program = torch.onnx.export(
                    net,
                    (clips[:2],),
                    dynamo=True,
                    dynamic_shapes=({0: "batch"},),
                    input_names=[INPUTS[modality]],
                    output_names=list(OUTPUTS),
                    verbose=False,
                )
        except Exception as error:  # noqa: BLE001  # Networks of other libraries fail in any operation.
            raise UserError(
                f"{name}: not exported, since ONNX cannot express it or its batch size ({_root_cause(error)}). Use "
                "another tower, or torch.export."
            ) from None
        assert program is not None
        _rename_intermediate_values(program.model.graph)
        program.model.metadata_props["distav"] = json.dumps(description["input"])
        program.save(path, external_data=size > _MAX_FILE_BYTES)
        return max(_difference(net, clips[:number], path, name) for number in (1, len(clips)))


def _difference(net: nn.Module, clips: Tensor, path: Path, name: str) -> float:
    """Return the largest difference of the outputs of a file from those of a network."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        outputs = session.run(list(OUTPUTS), {session.get_inputs()[0].name: clips.numpy()})
    except Exception as error:  # noqa: BLE001  # onnxruntime has several types of errors, which are not public.
        raise UserError(
            f"{name}: onnxruntime cannot run {path} ({_root_cause(error)}); do not use this file. Use another tower, "
            "or torch.export."
        ) from None
    differences = []
    for output, expected in zip(outputs, net(clips), strict=True):
        difference = (torch.from_numpy(output) - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise UserError(
                f"{name}: {path} differs from PyTorch by {difference:.2g}, more than {TOLERANCE:g}; do not use this "
                "file. Use another tower, or torch.export."
            )
        differences.append(difference)
    return max(differences)


def _rename_intermediate_values(graph: Any) -> None:
    """Rename values inside a graph that have the name of an output, such as those of embedding layers."""
    values = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.name in OUTPUTS and not any(value is output for output in graph.outputs):
            value.name = f"{value.name}_inside"


def _example_clips(modality: str, inputs: dict[str, Any]) -> Tensor:
    """Return clips of random frames or audio, in the input format of the network: [3, ...]."""
    generator = torch.Generator().manual_seed(0)
    if modality == "visual":
        side = inputs["frame_size"]
        shape = (3, inputs["num_frames"], side, side, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.rand(3, round(inputs["audio_s"] * inputs["sample_rate_hz"]), generator=generator) - 0.5


def _check_libraries() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is missing; install it with pip install 'distav[onnx]'.") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress and the warnings of the exporter, such as those on unused operators of torchvision."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _root_cause(error: BaseException) -> str:
    """Return the beginning of the message of the first error in a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__
