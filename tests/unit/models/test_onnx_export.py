"""Towers traced by torch.export, and as ONNX files run by onnxruntime: the outputs of PyTorch."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import adaptive_max_pool2d

import distav
from distav.config.errors import UserError
from distav.models.audio_encoders import NUM_BANDS, _max_of_bands
from distav.models.pretrained import load_encoders
from distav.tools.export_onnx import main
from tests.helpers.exports import example_clips, write_encoders

TOWERS = [
    ("small_conv", "small_conv"),
    ("r2plus1d_18", "avid_conv"),
    pytest.param("vit_tiny", "vit_tiny", marks=pytest.mark.long),
]


def require_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="needs onnx: pip install 'distav[onnx]'")


@pytest.mark.parametrize(("visual", "audio"), TOWERS)
def test_torch_export_traces_both_towers(visual: str, audio: str, tmp_path: Path):
    model, _ = load_encoders(write_encoders(tmp_path / "export", visual, audio))
    two, five = example_clips(2), example_clips(5)
    with torch.no_grad():
        for tower, traced, other in zip((model.visual, model.audio), two, five, strict=True):
            program = torch.export.export(tower, (traced,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            for clips in (traced, other):
                torch.testing.assert_close(program.module()(clips), tower(clips), rtol=1e-5, atol=1e-5)


def check_files(visual: str, audio: str, folder: Path) -> None:
    """Compare ONNX files with the network for another batch size than those of the export."""
    import onnxruntime

    export = write_encoders(folder / "export", visual, audio)
    differences = distav.export_onnx(export, folder / "onnx")
    assert differences.keys() == {"visual", "audio"} and max(differences.values()) < 1e-4
    model, description = load_encoders(export)
    frames, waveforms = example_clips(7)
    with torch.no_grad():
        outputs = {
            "visual": (model.visual(frames), model.project_visual(model.visual(frames))),
            "audio": (model.audio(waveforms), model.project_audio(model.audio(waveforms))),
        }
    for modality, name, clips in (("visual", "frames", frames), ("audio", "audio", waveforms)):
        session = onnxruntime.InferenceSession(folder / "onnx" / f"{modality}.onnx")
        (stated,) = session.get_inputs()
        assert (stated.name, stated.shape[1:]) == (name, list(clips.shape[1:])) and isinstance(stated.shape[0], str)
        assert stated.type == ("tensor(uint8)" if modality == "visual" else "tensor(float)")
        assert json.loads(session.get_modelmeta().custom_metadata_map["distav"]) == description["input"]
        actual = session.run(["features", "embedding"], {name: clips.numpy()})
        for values, expected in zip(actual, outputs[modality], strict=True):
            torch.testing.assert_close(torch.from_numpy(values), expected, rtol=1e-4, atol=1e-4)
            assert expected.std(0).max() > 0


def test_onnx_files_equal_the_network(tmp_path: Path):
    require_onnx()
    check_files("small_conv", "small_conv", tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(("visual", "audio"), [*TOWERS[1:], ("torchvision:resnet18", "small_conv")])
def test_onnx_files_of_other_towers_equal_the_network(visual: str, audio: str, tmp_path: Path):
    require_onnx()
    check_files(visual, audio, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ast", "wav2vec2", "whisper"])
def test_pretrained_audio_towers_are_exported(kind: str, tmp_path: Path):
    require_onnx()
    pytest.importorskip("transformers", reason="needs transformers: pip install 'distav[pretrained]'")
    from tests.helpers.hub_networks import save_audio

    save_audio(kind, tmp_path / "network")
    check_files("small_conv", f"hf:{tmp_path / 'network'}", tmp_path)


def test_maxima_of_bands_and_their_gradients_are_those_of_adaptive_pooling():
    for rows in (1, 2, 3, 4, 5, 8):
        x = torch.randn(3, 6, rows, 9).relu().requires_grad_()
        weights = torch.randn(3, 6, NUM_BANDS, 1)
        actual, expected = _max_of_bands(x), adaptive_max_pool2d(x, (NUM_BANDS, 1))
        assert torch.equal(actual, expected)
        gradients = [torch.autograd.grad((pooled * weights).sum(), x)[0] for pooled in (actual, expected)]
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_the_command_writes_the_towers_that_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    require_onnx()
    export = write_encoders(tmp_path / "export")
    assert main([str(export), "--out", str(tmp_path / "onnx"), "--modalities", "audio"]) == 0
    assert f"{tmp_path / 'onnx' / 'audio.onnx'}: largest difference from PyTorch" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["audio.onnx"]
    assert main([str(tmp_path), "--out", str(tmp_path / "onnx")]) == 1
    assert "holds no export" in capsys.readouterr().err


def test_what_cannot_be_exported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    require_onnx()
    export = write_encoders(tmp_path / "export")
    with pytest.raises(UserError, match="modalities=visul: allowed: visual, audio. Did you mean 'visual'?"):
        distav.export_onnx(export, tmp_path / "onnx", ["visul"])
    with pytest.raises(UserError, match="modalities=visul: allowed"):
        distav.export_onnx(export, tmp_path / "onnx", "visul")
    monkeypatch.setattr("distav.models.audio_encoders._max_of_bands", lambda x: adaptive_max_pool2d(x, (NUM_BANDS, 1)))
    with pytest.raises(UserError, match="audio tower small_conv: not exported, .*adaptive_max_pool2d"):
        distav.export_onnx(export, tmp_path / "onnx", ["audio"])
    monkeypatch.undo()
    monkeypatch.setattr("distav.models.onnx_export.TOLERANCE", -1.0)
    with pytest.raises(UserError, match="audio tower small_conv: .*audio.onnx differs from PyTorch by"):
        distav.export_onnx(export, tmp_path / "onnx", ["audio"])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"onnxscript is missing; install it with pip install 'distav\[onnx\]'"):
        distav.export_onnx(export, tmp_path / "onnx")
