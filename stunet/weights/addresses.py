"""Addresses of downloads: which are admitted, and how they are shown."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from stunet.errors import DownloadError

__all__ = ["check_url", "clean_url", "file_name_of"]


def check_url(url: str) -> None:
    """Check that an address is one that we download from.

    Raises:
        DownloadError: Another scheme than http and https, or no host.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises ValueError where it is no number
    except ValueError:
        good = False
    if not good:
        raise DownloadError(
            "an address that nothing is downloaded from",
            got=clean_url(url),
            expected="http://… or https://…",
            remedy="Give a file that you have by its path to `stunet weights verify` or `stunet convert` instead.",
        )


def clean_url(url: str) -> str:
    """An address without what may be secret in it: user, password, query and fragment."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        host = f"[{host}]" if ":" in host else host
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "an address that cannot be read"
    return f"{parts.scheme}://{host}{port}{parts.path}" if parts.scheme else parts.path


def file_name_of(url: str) -> str:
    """The last part of an address's path."""
    return unquote(urlsplit(url).path).rpartition("/")[2]
