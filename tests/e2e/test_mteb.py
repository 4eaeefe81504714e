"""An exported network on the tasks of mteb, with made data in the format of its tasks."""

import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distav.config.errors import UserError


# Imported in the tests, since every process of pytest-xdist collects this file.
@pytest.fixture(scope="module")
def mteb() -> Any:
    """The package mteb."""
    return pytest.importorskip("mteb")


@pytest.fixture(scope="module")
def decodes() -> None:
    """Skip tests in which mteb decodes media with torchcodec, if the libraries that this needs are not installed."""
    if not shutil.which("ffmpeg"):
        pytest.skip("FFmpeg is not installed (Debian: apt-get install ffmpeg)")


def made_task(kind: str, name: str) -> Any:
    """Return a task of mteb with made data."""
    return getattr(importlib.import_module(f"mteb.mocks.mock_tasks.{kind}"), name)()


@pytest.fixture(scope="module")
def encoder(finished: tuple[Path, str], mteb: Any) -> Any:
    from distav.mteb import DistavEncoder

    return DistavEncoder(finished[0] / "export", device="cpu", views=2)


@pytest.mark.parametrize("name", ["MockVideoClassification", "MockAudioClassification", "MockVideoAudioClassification"])
@pytest.mark.usefixtures("decodes")
def test_tasks_of_mteb_are_evaluated(encoder: Any, mteb: Any, name: str, tmp_path: Path):
    results = mteb.evaluate(encoder, [made_task("classification", name)], cache=mteb.ResultCache(tmp_path))
    scores = results.task_results[0].scores["test"][0]
    assert 0 <= scores["accuracy"] <= 1 and results.model_name == "distav/tiny"


@pytest.mark.usefixtures("decodes")
def test_results_of_another_number_of_views_are_not_taken_for_those_of_this_one(
    encoder: Any, finished: tuple[Path, str], mteb: Any, tmp_path: Path
):
    single = type(encoder)(finished[0] / "export", device="cpu", views=1)
    for model in (encoder, single):
        mteb.evaluate(model, [made_task("classification", "MockAudioClassification")], cache=mteb.ResultCache(tmp_path))
    assert len(list(tmp_path.rglob("MockAudioClassification*.json"))) == 2


@pytest.mark.usefixtures("mteb")
def test_unknown_tasks_are_named_before_a_network_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from tools.bench.command import main

    assert main(["mteb", str(tmp_path), "ESC-50", "--work", str(tmp_path)]) != 0
    assert "task ESC-50: allowed: tasks of mteb with audio or video alone; --list shows all" in capsys.readouterr().err


@pytest.mark.usefixtures("decodes")
def test_video_and_audio_are_compared_in_their_common_space(encoder: Any, mteb: Any, tmp_path: Path):
    task = made_task("pair_classification", "MockAsymVideoAudioPairClassificationTask")
    results = mteb.evaluate(encoder, [task], cache=mteb.ResultCache(tmp_path))
    assert results.task_results[0].scores["test"]


def test_projections_represent_clips_in_the_common_space(encoder: Any):
    width = encoder.embedder.embed_arrays(None, np.zeros((1, 4000), np.float32)).audio_embedding.shape[1]
    clips = encoder._clips([{"audio": {"array": np.zeros(4000), "sampling_rate": 8000}}])
    assert encoder._embed(clips, True).shape == (1, width)


@pytest.mark.usefixtures("decodes")
def test_features_are_those_of_the_embedder(encoder: Any):
    task = made_task("classification", "MockAudioClassification")
    task.load_data()
    row = task.dataset["test"][0]
    (frames, audio), rate = encoder._clips([row])[0], encoder.inputs["sample_rate_hz"]
    assert frames is None and audio.shape == (2, round(encoder.inputs["audio_s"] * rate))
    expected = encoder.embedder.embed_arrays(None, audio).audio
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder._embed([(frames, audio)], False)[0], expected.mean(0), rtol=1e-5)
    both = encoder.embedder.embed_arrays(np.zeros((2, *_frame_shape(encoder)), np.uint8), audio)
    assert both.has_visual.all() and not encoder.embedder.embed_arrays(None, audio).has_visual.any()


def _frame_shape(encoder: Any) -> tuple[int, ...]:
    size = encoder.inputs["frame_size"]
    return encoder.inputs["num_frames"], size, size, 3


@pytest.mark.usefixtures("decodes")
def test_views_of_a_video_are_centered_squares_at_the_distance_of_training(encoder: Any):
    task = made_task("classification", "MockVideoClassification")
    task.load_data()
    (frames, audio), = encoder._clips([task.dataset["test"][0]])  # fmt: skip
    assert audio is None and frames.shape == (2, *_frame_shape(encoder)) and frames.dtype == np.uint8
    assert frames.std() > 0


def test_tasks_with_text_are_rejected(encoder: Any, mteb: Any, tmp_path: Path):
    task = made_task("retrieval", "MockVideoRetrievalV2T")
    with pytest.raises(ValueError, match=r"supports \['video', 'audio'\], but none overlap"):
        mteb.evaluate(encoder, [task], cache=mteb.ResultCache(tmp_path))
    with pytest.raises(UserError, match="distav embeds video and audio"):
        encoder._embed([(None, None)], False)
