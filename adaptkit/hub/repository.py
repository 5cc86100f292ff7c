"""Adapters on the Hugging Face Hub: ``push`` writes a repository, ``load`` reads one.

A repository holds what ``AdaptedModel.save`` writes: weights, config and card. What the Hub client raises leaves here
in plain words (:mod:`adaptkit.hub.errors`).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from adaptkit.hub import file as files
from adaptkit.hub.card import check_metadata, is_hub_id, model_card, renewed
from adaptkit.hub.errors import at, plain_errors
from adaptkit.hub.file import CARD, CONFIG, WEIGHTS, AdapterFile
from adaptkit.hub.metadata import check_names, plain
from adaptkit.version import __version__

__all__ = ["Commit", "is_hub_id", "load", "push"]


class Commit(NamedTuple):
    """What ``push`` made."""

    url: str  #: page of the commit
    sha: str  #: pass it as ``revision=`` to get exactly these files again


def load(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str = "",
    allow_nonfinite: bool = False,
) -> AdapterFile:
    """Read a saved adapter: a folder, the safetensors file in it, or ``"org/name"`` on the Hub.

    A path that exists here wins. From the Hub only the adapter's two files are downloaded, into the usual cache.

    Args:
        source: path or Hub id.
        revision: branch, tag or commit of the repository.
        token: for private and gated repositories; by default the one of ``hf auth login``.
        cache_dir: in place of the usual cache.
        local_files_only: read the cache and do not ask the Hub.
        force_download: download again what is in the cache.
        subfolder: of the folder or repository, where it holds several adapters.
        allow_nonfinite: read weights that are NaN or infinite, which are an error otherwise.

    Raises ``FileNotFoundError`` where there is no adapter, ``PermissionError`` where it may not be read,
    ``ConnectionError`` or ``OSError`` where the download failed, and ``ValueError`` where the file is damaged, of
    something else or of a newer format.
    """
    if not is_hub_id(source):
        if revision is not None:
            raise ValueError(f"{source} is read from this disk, and revision={revision!r} is for ids of the Hub")
        return files.load(Path(source) / subfolder if subfolder else source, allow_nonfinite)
    options = {"token": token, "cache_dir": cache_dir, "force_download": force_download}
    path = _fetch(str(source), revision, subfolder, local_files_only, options)
    try:
        return files.load(path, allow_nonfinite)
    except ValueError as error:
        raise ValueError(f"{error} (it came from {at(str(source), revision)}: force_download=True)") from error


def push(
    model: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    extra: Mapping[str, Any] = MappingProxyType({}),
    **metadata: Any,
) -> Commit:
    """Upload what ``model.save`` writes to a model repository, in one commit; make the repository if it is not there.

    No other file of the repository is touched. Of a card that is there already, what a person wrote stays: the text
    around the part that adaptkit wrote, and the keys of its front matter that this card does not set.

    Args:
        model: an :class:`~adaptkit.model.adapted.AdaptedModel`.
        repo_id: ``"user/name"``.
        private: of a new repository; None is the default of the account.
        token: that may write; by default the one of ``hf auth login``.
        revision: branch to commit to, made from the main one if it is not there.
        commit_message: in place of "Upload <adapters> with adaptkit".
        extra: metadata of your own, by any name: kept in the file, not shown on the card.
        metadata: as for ``save``, by the names that mean something (:data:`adaptkit.hub.metadata.KNOWN`); see
            :func:`adaptkit.hub.card.model_card` for what of it the card shows.

    Raises ``ValueError`` for a wrong id or metadata, for a name that nothing reads, and where the repository exists and
    is not private as asked; ``PermissionError``, ``ConnectionError`` or ``OSError`` where the Hub refuses or the
    repository changed meanwhile.
    """
    from huggingface_hub import HfApi

    if not isinstance(repo_id, str) or repo_id.count("/") != 1:
        raise ValueError(f"repo_id={repo_id!r} is no repository; give 'user/name'")
    check_names(metadata)
    taken = [name for name in extra if name in ("folder", "name")]
    if taken:
        raise ValueError(f"extra={{{taken[0]!r}: ...}} is an argument of save, not metadata: choose another name")
    metadata = {**extra, **metadata}
    check_metadata(plain(metadata))
    api = HfApi(token=token, library_name="adaptkit", library_version=__version__)
    with tempfile.TemporaryDirectory() as temporary, plain_errors(repo_id, revision):
        folder = Path(temporary) / "adapter"
        model.save(folder, **metadata)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
        if private is not None and info.private is not private:
            raise ValueError(
                f"{repo_id} exists and is {'private' if info.private else 'public'}, you asked for private={private}: "
                "change its visibility on the Hub, or push to another name. Nothing was uploaded"
            )
        header = json.loads((folder / CONFIG).read_text())
        (folder / CARD).write_text(_card(api, repo_id, info, header, temporary), encoding="utf-8")
        names = " + ".join(a["name"] for a in header["adapters"]) or "head"
        said = commit_message or f"Upload {names} with adaptkit"
        # parent_commit: the card was merged with this one and no other.
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=said, parent_commit=info.sha
        )
        return Commit(done.commit_url, done.oid)


def _card(api: Any, repo_id: str, info: Any, header: dict[str, Any], cache_dir: str) -> str:
    """Return the card for a repository as it stands: with the words of the card that is there."""
    card = model_card(header, repo_id)
    if CARD not in {file.rfilename for file in info.siblings or []}:
        return card
    old = api.hf_hub_download(repo_id, CARD, revision=info.sha, cache_dir=cache_dir)
    return renewed(card, Path(old).read_text(encoding="utf-8"), repo_id, header["metadata"])


def _fetch(repo_id: str, revision: str | None, subfolder: str, local_files_only: bool, options: dict[str, Any]) -> Path:
    """Download weights and config of one commit; returns the path of the weights."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    inside = f"{subfolder}/" if subfolder else ""
    options = {**options, "local_files_only": local_files_only, "library_name": "adaptkit"}
    options["library_version"] = __version__
    with plain_errors(repo_id, revision, looking_for=inside + WEIGHTS, **options):
        weights = Path(hf_hub_download(repo_id, inside + WEIGHTS, revision=revision, **options))
        commit = weights.parents[inside.count("/")].name
        # The config says nothing that the weights do not, but people read it, and the Hub counts its downloads.
        with suppress(EntryNotFoundError):
            hf_hub_download(repo_id, inside + CONFIG, revision=commit, **options)
        return weights
