"""What the Hub client raises, in plain words: what was asked of whom, what came back, and what to do.

Everything leaves as an ``OSError``: ``FileNotFoundError``, ``PermissionError`` or ``ConnectionError``. Errors are told
apart by ``huggingface_hub.errors``, never by the HTTP library below it, which differs between its versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["at", "plain_errors"]

LOG_IN = "log in with `hf auth login`, or pass token="


def at(repo_id: str, revision: str | None) -> str:
    """Name a repository, and the revision where one was asked for."""
    return f"{repo_id} at revision {revision!r}" if revision else repo_id


@contextmanager
def plain_errors(repo_id: str, revision: str | None, looking_for: str = "", **options: Any) -> Iterator[None]:
    """Around calls of ``huggingface_hub``: raise what they raise as an ``OSError`` in plain words.

    ``looking_for``: the file that is being downloaded, with the ``options`` of the download; empty in an upload.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # The client's own error and a broken connection have one base: that of the HTTP library, whichever it is.
    kinds: Any = (OSError, *HfHubHTTPError.__bases__)
    try:
        yield
    except (RuntimeError, *kinds) as error:
        # A thread that uploads a large file wraps what happened to it in a RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, kinds):
            raise
        plain = _explain(cause, repo_id, revision, looking_for, options)
        if plain is None:
            raise
        raise plain from error


def _explain(
    error: BaseException, repo_id: str, revision: str | None, looking_for: str, options: dict[str, Any]
) -> OSError | None:
    from huggingface_hub import constants, errors

    hub, where = constants.ENDPOINT, at(repo_id, revision)
    nothing_here = f"no folder or file is named {repo_id!r} here, and " if looking_for else ""
    # From the narrow classes to the wide ones: several of them are subclasses of one another.
    if isinstance(error, errors.LocalEntryNotFoundError):
        cache = options.get("cache_dir") or constants.HF_HUB_CACHE
        return FileNotFoundError(f"{nothing_here}{where} is not in the cache {cache}; {_unreachable(error, options)}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ConnectionError(f"cannot ask the Hub for {where}: {_unreachable(error, options)}")
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(
            f"{repo_id} is gated and this account is not on its list: ask for access at {hub}/{repo_id}, then {LOG_IN}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"{nothing_here}{hub} has no model repository {repo_id} that you may see: check the name; if it is "
            f"private, {LOG_IN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{repo_id} has no revision {revision!r}; {_revisions(repo_id, options)}")
    if isinstance(error, errors.EntryNotFoundError):
        return FileNotFoundError(
            f"{where} holds no adapter of adaptkit: there is no {looking_for} among "
            f"{_contents(repo_id, revision, options)}. Name the repository, revision= or subfolder= that "
            "AdaptedModel.push wrote"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, where)
    if not isinstance(error, OSError):  # of the HTTP library
        return ConnectionError(f"cannot reach the Hub at {hub} for {where}: {error!r}. Check the connection")
    if not looking_for:
        return None  # of this disk
    return OSError(f"the download of {looking_for} from {where} did not complete: {error}. Try again")


def _unreachable(error: BaseException, options: dict[str, Any]) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: unset it, or load it once while online"
    if options.get("local_files_only"):
        return "local_files_only=True: leave it out, or load it once without"
    return f"the Hub at {constants.ENDPOINT} did not answer ({error.__cause__ or error}): check the connection"


def _refused(error: Any, where: str) -> OSError:
    status, said = error.response.status_code, error.server_message or str(error).strip().splitlines()[0]
    if status == 401:
        return PermissionError(f"the Hub wants a token that it knows for {where} ({said}): {LOG_IN}")
    if status == 403:
        return PermissionError(f"the Hub refused access to {where} ({said}): use a token that has this right")
    if status in (409, 412):
        return OSError(f"{where} was changed by somebody else at the same time ({said}): push again")
    return OSError(f"the Hub answered {status} for {where}: {said}")


def _contents(repo_id: str, revision: str | None, options: dict[str, Any]) -> str:
    """What is in a repository, for an error message: never an error of its own."""
    from huggingface_hub import HfApi

    try:
        names = sorted(HfApi(token=options.get("token")).list_repo_files(repo_id, revision=revision))
    except Exception:
        return "its files"
    return f"its files {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def _revisions(repo_id: str, options: dict[str, Any]) -> str:
    from huggingface_hub import HfApi

    try:
        refs = HfApi(token=options.get("token")).list_repo_refs(repo_id)
    except Exception:
        return "see its branches and tags on the Hub"
    return f"its branches and tags are {', '.join(ref.name for ref in (*refs.branches, *refs.tags))}, or give a commit"
