"""Checkpoints from the Hugging Face Hub: only the files that are needed, all of one commit."""

from collections.abc import Callable, Collection
from pathlib import Path

from dia_fast.errors import CheckpointError
from dia_fast.model.config import DiaConfig

SECONDS_TO_ANSWER = 10.0  # that the Hub has


def download(
    repository: str,
    find_weights: Callable[[Collection[str], str], str],
    read_index: Callable[[Path], list[str]],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Bring config.json and the weights of a repository into the local cache; returns their folder.

    find_weights chooses among the names of the repository's files; read_index names the shards of an index. The
    configuration comes first and is read, so that what cannot be used is refused before gigabytes of it are fetched.
    Without a connection, or under `local_files_only`, the folder is what the cache has.

    Raises:
        CheckpointError: For a checkpoint that cannot be used.
    """
    names = _names_or_cache(repository, revision, local_files_only)
    if isinstance(names, Path):
        return names

    def fetch(name: str) -> Path:
        return fetch_file(repository, name, revision)

    if "config.json" not in names:
        raise CheckpointError(f"the Hub repository {repository} has no config.json: not a Dia checkpoint")
    config = fetch("config.json")
    DiaConfig.from_file(config)
    entry = fetch(find_weights(names, f"the Hub repository {repository}"))
    fetched = [entry]
    if "generation_config.json" in names:
        fetched.append(fetch("generation_config.json"))
    if entry.name.endswith(".index.json"):
        fetched += [fetch(shard) for shard in read_index(entry)]
    return _one_folder(repository, [config, *fetched])


def download_files(
    repository: str, wanted: Collection[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """As `download`, for those of some files that the repository has; the first of `wanted` must be there."""
    names = _names_or_cache(repository, revision, local_files_only)
    if isinstance(names, Path):
        return names
    first, *_ = wanted
    if first not in names:
        raise CheckpointError(f"the Hub repository {repository} has no {first}")
    return _one_folder(repository, [fetch_file(repository, name, revision) for name in wanted if name in names])


def _names_or_cache(repository: str, revision: str | None, local_files_only: bool) -> list[str] | Path:
    """The files of a repository; its folder in the cache if they are not to be had."""
    import huggingface_hub
    from huggingface_hub import errors

    reason = "it may not be downloaded (local_files_only)"
    if not local_files_only:
        try:
            return file_names(repository, revision)
        except Unreachable as error:
            reason = str(error)
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, local_files_only=True))
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        raise CheckpointError(
            f"{repository} is neither a local folder nor in the cache of the Hub{_at(revision)}, and {reason}"
        ) from None


def _one_folder(repository: str, files: list[Path]) -> Path:
    if any(path.parent != files[0].parent for path in files):
        raise CheckpointError(f"the Hub repository {repository} changed during the download; try again")
    return files[0].parent


class Unreachable(CheckpointError):
    """No connection to the Hub."""


def file_names(repository: str, revision: str | None = None) -> list[str]:
    """The files of a repository, asked for once.

    Raises:
        Unreachable: Without a connection.
        CheckpointError: For what the Hub refuses.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        info = huggingface_hub.HfApi().model_info(repository, revision=revision, timeout=SECONDS_TO_ANSWER)
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"the Hub repository {repository} has no revision {revision!r}") from None
    except errors.GatedRepoError:
        raise CheckpointError(f"the Hub repository {repository} asks you to accept its terms and to log in") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{repository} is neither a local folder nor a repository of the Hub that you may read"
        ) from None
    except Exception as error:  # whatever the HTTP library in use raises for a connection that fails
        raise Unreachable(f"the Hub cannot be reached: {reason_of(error)}") from None
    return [item.rfilename for item in info.siblings or ()]


def fetch_file(repository: str, name: str, revision: str | None = None) -> Path:
    """One file of a repository, in the cache.

    Raises:
        CheckpointError: For a checkpoint that cannot be used.
    """
    import huggingface_hub

    # By the name of the revision, not by its commit: so the cache knows later, offline, what the name stands for.
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))
    except Exception as error:  # the Hub client raises its own, its HTTP library's and the system's errors
        raise CheckpointError(
            f"cannot download {name} of the Hub repository {repository}: {reason_of(error)}"
        ) from None


def reason_of(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _at(revision: str | None) -> str:
    return f" at revision {revision!r}" if revision else ""
