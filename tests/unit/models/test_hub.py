"""Exports in model repositories of a hub: a local server with its endpoints, or nothing that answers."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import distav
from distav.config.errors import UserError
from distav.config.model import ModelConfig
from distav.models.export_files import LICENSE_NOTE, UNKNOWN_LICENSE
from distav.models.hub import export_folder
from distav.models.pretrained import load_encoders, load_parser, load_weights, weights_digest
from distav.tools.embed import main as embed
from distav.training.initial_weights import InitialWeights
from tests.helpers.exports import example_clips, write_encoders, write_parser
from tests.helpers.hub_server import TOKEN, Hub, Repository, hub_server

hub_library = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: pip install 'distav[hub]'")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the library uses, with an empty cache and without a stored token."""
    with hub_server() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def export(folder: Path) -> Path:
    write_encoders(folder)
    card = '---\nlicense: unknown\n---\n# mine\n\n`distav.load_encoders("export")  # or "hf://USER/NAME"`\n'
    (folder / "README.md").write_text(card)
    (folder / "notes.py").write_text("raise SystemExit")
    return folder


def test_an_uploaded_export_is_loaded_from_the_hub(hub: Hub, tmp_path: Path):
    folder = export(tmp_path / "export")
    location = distav.push_to_hub(folder, "lab/mine", private=True, commit_message="first", token=TOKEN)
    repository = hub.repositories["lab/mine"]
    (commit,) = repository.commits
    assert location == f"hf://lab/mine@{commit}" and repository.private and repository.messages == ["first"]
    assert repository.commits[commit].keys() == {"config.json", "model.safetensors", "README.md"}
    assert b'load_encoders("hf://lab/mine")' in repository.commits[commit]["README.md"]
    with pytest.raises(UserError, match="hf://lab/mine: no such model repository, or no access .* set HF_TOKEN"):
        load_encoders("hf://lab/mine")
    repository.private = False
    model, description = load_encoders(location)
    own, _ = load_encoders(folder)
    frames, audio = example_clips(2)
    assert torch.equal(model.visual(frames), own.visual(frames)) and torch.equal(model.audio(audio), own.audio(audio))
    assert description["classes"] == ["bell", "dog", "drum", "rain", "train"]
    assert weights_digest("hf://lab/mine") == weights_digest(folder)
    assert load_weights(Path("hf://lab/mine")).keys() == own.state_dict().keys()
    messages: list[str] = []
    initial = InitialWeights(ModelConfig(pretrained="hf://lab/mine"), cast(Any, SimpleNamespace(info=messages.append)))
    assert torch.equal(initial(own)["visual.net.project.weight"], own.state_dict()["visual.net.project.weight"])
    assert messages == ["initialized from hf://lab/mine"]
    np.savez(tmp_path / "clips.npz", frames=frames.numpy(), audio=audio.numpy())
    arguments = [str(tmp_path / "clips.npz"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert embed(["hf://lab/mine", *arguments]) == 0
    actual = np.array(pq.read_table(tmp_path / "out").column("audio").to_pylist())
    np.testing.assert_allclose(actual, own.audio(audio).detach().numpy(), atol=1e-5)


def test_revisions_are_branches_tags_and_commits(hub: Hub, tmp_path: Path):
    repository = hub.repositories["lab/parser"] = Repository()
    folder = write_parser(tmp_path / "export")
    first = repository.commit({path.name: path.read_bytes() for path in folder.iterdir()})
    repository.revisions["v1"] = first
    repository.commit({"config.json": b"{}", "pytorch_model.bin": b"code"})
    for revision in ("v1", first):
        model, _ = load_parser(f"hf://lab/parser@{revision}")
        assert not model.training
    with pytest.raises(UserError, match="config.json has export format None; this version of distav reads format"):
        load_parser("hf://lab/parser")
    assert not list((tmp_path / "cache").rglob("*.bin"))
    with pytest.raises(UserError, match="'v2'; allowed: a branch, a tag or a commit"):
        load_parser("hf://lab/parser@v2")
    repository.commit({"config.json": b"[]"})
    with pytest.raises(UserError, match="has export format None"):
        load_parser("hf://lab/parser@main")
    hub.repositories["lab/other"] = Repository()
    hub.repositories["lab/other"].commit({"pytorch_model.bin": b"code"})
    with pytest.raises(UserError, match="hf://lab/other holds no export; expected model.safetensors and config.json"):
        load_encoders("hf://lab/other")


def test_without_a_network_the_cache_is_used_or_the_error_says_what_to_fetch(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    location = distav.push_to_hub(export(tmp_path / "export"), "lab/mine", token=TOKEN)
    folder = export_folder("hf://lab/mine")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    number = len(hub.requests)
    assert export_folder("hf://lab/mine") == folder == export_folder(location)
    assert len(hub.requests) == number
    shutil.rmtree(tmp_path / "cache")
    advice = (
        f"run: hf download lab/mine --revision v1; .* copied to {tmp_path / 'cache'} on this machine. Or give a local"
    )
    with pytest.raises(UserError, match=rf"hf://lab/mine@v1: not available here \(.*{advice}"):
        load_encoders("hf://lab/mine@v1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="hf://lab/mine: not available here"):
        load_encoders("hf://lab/mine")
    with pytest.raises(UserError, match="repo_id=lab/mine: not uploaded .*run hf auth login"):
        distav.push_to_hub(tmp_path / "export", "lab/mine", token=TOKEN)


def test_a_license_is_written_to_the_uploaded_card_alone(hub: Hub, tmp_path: Path):
    folder = export(tmp_path / "export")
    text = f"---\n{UNKNOWN_LICENSE}\ntags:\n- distav\n---\n- License: {LICENSE_NOTE}. More.\n\nlicense: as above\n"
    (folder / "README.md").write_text(text)
    distav.push_to_hub(folder, "lab/mine", license="cc-by-4.0", token=TOKEN)
    (files,) = hub.repositories["lab/mine"].commits.values()
    expected = "---\nlicense: cc-by-4.0\ntags:\n- distav\n---\n- License: cc-by-4.0. More.\n\nlicense: as above\n"
    assert files["README.md"].decode() == expected
    assert (folder / "README.md").read_text() == text


def test_uploads_are_checked(hub: Hub, tmp_path: Path):
    folder = export(tmp_path / "export")
    with pytest.raises(UserError, match="folder=5: allowed: the path of an export/ directory"):
        distav.push_to_hub(cast(Any, 5), "lab/mine", token=TOKEN)
    with pytest.raises(UserError, match="license='CC BY': allowed: an identifier of the hub in lower case"):
        distav.push_to_hub(folder, "lab/mine", license="CC BY", token=TOKEN)
    with pytest.raises(UserError, match="repo_id=mine: allowed: USER/NAME"):
        distav.push_to_hub(folder, "mine", token=TOKEN)
    with pytest.raises(UserError, match="repo_id=lab/mine: not uploaded .*set HF_TOKEN or pass a token"):
        distav.push_to_hub(folder, "lab/mine", token="hf_wrong")
    hub.repositories["lab/mine"] = Repository()
    with pytest.raises(UserError, match="private=True: lab/mine exists and is public"):
        distav.push_to_hub(folder, "lab/mine", private=True, token=TOKEN)
    assert not hub.repositories["lab/mine"].commits
    (folder / "README.md").unlink()
    with pytest.raises(UserError, match="holds no README.md, the model card"):
        distav.push_to_hub(folder, "lab/mine", token=TOKEN)
    (folder / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match="model.safetensors is corrupt"):
        distav.push_to_hub(folder, "lab/mine", token=TOKEN)
    with pytest.raises(UserError, match="holds no export; expected"):
        distav.push_to_hub(tmp_path, "lab/mine", token=TOKEN)


@pytest.mark.parametrize("location", ["hf://lab", "hf://lab/mine/part", "hf://lab/mine@", "hf://../mine", "hf://"])
def test_names_of_repositories_are_checked(location: str):
    with pytest.raises(UserError, match="allowed: hf://USER/NAME or hf://USER/NAME@REVISION"):
        load_encoders(location)


def test_the_endpoint_is_that_of_the_environment_and_the_library_is_optional(hub: Hub, tmp_path: Path):
    distav.push_to_hub(export(tmp_path / "export"), "lab/mine", token=TOKEN)
    load = (
        "import distav; model, description = distav.load_encoders('hf://lab/mine'); print(len(description['classes']))"
    )
    missing = f"import sys; sys.modules['huggingface_hub'] = None; {load}"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    for code, output in (
        (load, "5"),
        (missing, "install it with pip install 'distav[hub]', or give a local directory"),
    ):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert output in result.stdout + result.stderr
    assert list((tmp_path / "home" / "hub").rglob("model.safetensors"))
