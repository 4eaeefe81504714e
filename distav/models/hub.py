"""Exported networks in model repositories of the Hugging Face hub: `hf://USER/NAME` and `hf://USER/NAME@REVISION`.

Only weights in safetensors, the JSON description and the model card are uploaded or downloaded; no code is.
"""

import re
from pathlib import Path
from typing import Any

from distav.config.errors import UserError
from distav.config.version import __version__
from distav.models.export_files import (
    DESCRIPTION,
    EXAMPLE_LOCATION,
    EXAMPLE_REPOSITORY,
    LICENSE_NOTE,
    MODEL_CARD,
    WEIGHTS,
    check_weights,
    read_description,
)

SCHEME = "hf://"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def export_folder(location: str | Path) -> Path:
    """Return the local directory of an export, which is downloaded if it is on the hub and not in its cache.

    The files of a branch or tag are those of its newest commit if the hub can be reached, and otherwise those in the
    cache, `~/.cache/huggingface/hub` or where HF_HOME says.

    Args:
        location: a directory, `hf://USER/NAME`, or `hf://USER/NAME@REVISION` with a branch, a tag or a commit.

    Raises:
        UserError: if the repository cannot be had, or huggingface_hub is missing.
    """
    hub_name = re.fullmatch(r"hf:/+(.*)", str(location))  # pathlib removes a slash.
    if hub_name is None:
        return Path(location).expanduser()
    repository, separator, revision = hub_name[1].partition("@")
    name = SCHEME + hub_name[1]
    if not _REPOSITORY.fullmatch(repository) or (separator and not revision):
        raise UserError(f"{name}: allowed: {SCHEME}USER/NAME or {SCHEME}USER/NAME@REVISION.")
    hub = _import_hub(name, "give a local directory")
    try:
        return Path(
            hub.snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=[DESCRIPTION, WEIGHTS, MODEL_CARD],
                library_name="distav",
                library_version=__version__,
            )
        )
    except hub.errors.RevisionNotFoundError:
        raise UserError(
            f"{name}: the repository has no revision '{revision or 'main'}'; allowed: a branch, a tag or a commit."
        ) from None
    except hub.errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: no such model repository, or no access to it ({_first_line(error)}). Check the name; for a "
            "private repository, run hf auth login or set HF_TOKEN."
        ) from None
    except Exception as error:  # noqa: BLE001  # Failed transfers raise the types of several HTTP clients.
        option = f" --revision {revision}" if revision else ""
        raise UserError(
            f"{name}: not available here ({_first_line(error)}). Where there is a network, run: hf download "
            f"{repository}{option}; the files are then in the cache of the hub, ~/.cache/huggingface/hub, which can be "
            f"copied to {hub.constants.HF_HUB_CACHE} on this machine. Or give a local directory that holds "
            f"{DESCRIPTION} and {WEIGHTS}."
        ) from None


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    license: str | None = None,
    commit_message: str = "Upload a network exported by distav",
    token: str | None = None,
) -> str:
    """Upload an export to a model repository of the Hugging Face hub in one commit.

    The repository is created if it does not exist. The usage example of the uploaded model card loads the network from
    it.

    Args:
        folder: an `export/` directory.
        repo_id: `USER/NAME` or `ORGANIZATION/NAME`.
        private: whether the repository is private; None: the default of the hub for a new one, and unchanged for an
            existing one.
        license: identifier that the hub knows, such as "apache-2.0", for the model card; None: as the model card says.
        commit_message: first line of the message of the commit.
        token: access token with write permission; None: HF_TOKEN, or that of `hf auth login`.

    Returns:
        The location of the commit, `hf://USER/NAME@COMMIT`, for `distav.load_encoders`.

    Raises:
        UserError: if the directory holds no complete export, an existing repository is not as private as `private`
            says, or the hub rejects the upload.

    Example:
        >>> location = distav.push_to_hub("runs/mine/export", "USER/NAME", license="cc-by-4.0")
        >>> model, description = distav.load_encoders(location)
    """
    if not isinstance(folder, str | Path):
        raise UserError(f"folder={folder!r}: allowed: the path of an export/ directory.")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise UserError(
            f"license={license!r}: allowed: an identifier of the hub in lower case, such as apache-2.0 or cc-by-4.0."
        )
    path = Path(folder).expanduser()
    read_description(path, folder)
    check_weights(path)
    if not (path / MODEL_CARD).is_file():
        raise UserError(f"{folder} holds no {MODEL_CARD}, the model card; write one, or export the network again.")
    if not _REPOSITORY.fullmatch(repo_id):
        raise UserError(f"repo_id={repo_id}: allowed: USER/NAME or ORGANIZATION/NAME.")
    hub = _import_hub(f"repo_id={repo_id}", "upload the files by hand")
    card = _card_of_repository((path / MODEL_CARD).read_text(), repo_id, license)
    contents = {DESCRIPTION: path / DESCRIPTION, WEIGHTS: path / WEIGHTS, MODEL_CARD: card.encode()}
    api = hub.HfApi(token=token, library_name="distav", library_version=__version__)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        is_private = api.repo_info(repo_id).private
        if private is not None and is_private != private:
            raise UserError(
                f"private={private}: {repo_id} exists and is {'private' if is_private else 'public'}; change this in "
                "its settings on the hub, or choose another repo_id."
            )
        operations = [hub.CommitOperationAdd(name, content) for name, content in contents.items()]
        commit = api.create_commit(repo_id, operations, commit_message=commit_message)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  # Failed transfers raise the types of several HTTP clients.
        raise UserError(
            f"repo_id={repo_id}: not uploaded ({_first_line(error)}). Check the network and the name; for write "
            "access, run hf auth login, set HF_TOKEN or pass a token."
        ) from None
    return f"{SCHEME}{repo_id}@{commit.oid}"


def _card_of_repository(card: str, repo_id: str, license: str | None) -> str:
    """Return a model card whose usage example loads the network from a repository, with a license if there is one."""
    location = SCHEME + repo_id
    card = card.replace(EXAMPLE_LOCATION, f'"{location}")').replace(SCHEME + EXAMPLE_REPOSITORY, location)
    if license is None:
        return card
    head, separator, text = card.partition("\n---\n")  # The metadata are YAML between two lines of dashes.
    head = re.sub(r"^license:.*$", f"license: {license}", head, flags=re.MULTILINE)
    return head + separator + text.replace(LICENSE_NOTE, license)


def _import_hub(name: str, alternative: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise UserError(
            f"{name}: huggingface_hub is missing; install it with pip install 'distav[hub]', or {alternative}."
        ) from None
    return huggingface_hub


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]
