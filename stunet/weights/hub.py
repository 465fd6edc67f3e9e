"""Files in Hugging Face repositories, found with Hugging Face's own library."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from stunet.errors import DownloadError

__all__ = ["HubFile", "locate"]


@dataclass(frozen=True)
class HubFile:
    """A file in a repository.

    Attributes:
        url: Its address; the revision in it is a commit where the server names one.
        headers: Headers to ask for it with, the user's token among them.
        sha256: Its checksum where Hugging Face states it.
        bytes: Its length where Hugging Face states it.
    """

    url: str
    headers: dict[str, str] = field(repr=False)
    sha256: str | None
    bytes: int | None


def locate(repository: str, file: str) -> HubFile:
    """Find a file in a repository: where it is, and what Hugging Face says of it.

    ``huggingface_hub`` finds the address (``HF_ENDPOINT``), the token of the user (``hf auth login``, ``HF_TOKEN``),
    the commit and the checksum. The bytes are left to :func:`stunet.weights.download.download`, as its own download
    does not go on after its process has ended.

    Args:
        repository: ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.
        file: Path of the file in it.

    Raises:
        DownloadError: ``huggingface_hub`` is missing, or Hugging Face cannot be asked, or has no such file.
    """
    try:
        from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url
    except ImportError:
        raise DownloadError(
            "a missing library",
            got="huggingface_hub is not installed",
            expected="huggingface_hub, which finds files in Hugging Face repositories",
            remedy="Run `pip install 'stunet[hub]'`, or give the file's address with --url.",
        ) from None
    repo_id, _, revision = repository.partition("@")
    try:
        token = get_token()
        found = get_hf_file_metadata(hf_hub_url(repo_id, file, revision=revision or None), token=token)
        url = hf_hub_url(repo_id, file, revision=found.commit_hash or revision or None)
    except Exception as error:  # whatever HTTP client it uses in this version has its own errors
        raise _refused(repository, file, error) from None
    etag = found.etag or ""
    return HubFile(
        url=url,
        headers={"Authorization": f"Bearer {token}"} if token else {},
        sha256=etag if re.fullmatch("[0-9a-f]{64}", etag) else None,
        bytes=found.size,
    )


def _refused(repository: str, file: str, error: Exception) -> DownloadError:
    reasons = {
        "RepositoryNotFoundError": "there is no such repository, or it is not public",
        "RevisionNotFoundError": "the repository has no such revision",
        "EntryNotFoundError": "the repository has no such file",
        "RemoteEntryNotFoundError": "the repository has no such file",
        "GatedRepoError": "its owner must grant access first",
        "HFValidationError": "not the name of a repository",
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    }
    status = getattr(getattr(error, "response", None), "status_code", None)
    answer = f"the server answers {status}" if status else f"no answer ({type(error).__name__})"
    reason = reasons.get(type(error).__name__, answer)
    return DownloadError(
        "a Hugging Face repository that does not give the file",
        got=f"{repository}, {file}: {reason}",
        expected="OWNER/NAME or OWNER/NAME@REVISION of a repository with this file",
        remedy="Check --hf and the connection; for repositories that are not public run `hf auth login` first.",
    )
