"""What every download has in common: https unless http is allowed, and a limit on waiting."""

import hashlib
import http.client
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from vidt.errors import UserError, shown

PATIENCE = 60  # seconds without a byte after which a download fails
CHUNK = 1 << 20  # bytes that are read at once
MOST_IMAGE_BYTES = 2**28  # of an image's file: more than Pillow would decode


class Unreachable(UserError):
    """Something cannot be downloaded; the message is one line with an alternative."""


def is_url(source: object) -> bool:
    """Whether this is an address rather than a path."""
    return isinstance(source, str) and "://" in source


def require_scheme(source: str, url: str, allow_http: bool) -> None:
    """Raises Unreachable unless the URL is https, or http that is allowed."""
    scheme = urlparse(url).scheme.lower()
    if scheme == "http" and not allow_http:
        raise Unreachable(
            f"{source} would come unencrypted, and anybody on the way could replace it; use its "
            "https address, or pass --allow_http"
        )
    if scheme not in ("http", "https"):
        raise Unreachable(f"{source} is no https address; give the path of a file")


class SameSchemes(urllib.request.HTTPRedirectHandler):
    """Follows no redirection away from https."""

    def __init__(self, allow_http: bool) -> None:
        self.allow_http = allow_http

    def redirect_request(self, req: Any, fp: Any, code: Any, *more: Any) -> Any:
        message, headers, url = more
        require_scheme(url, url, self.allow_http)
        return super().redirect_request(req, fp, code, message, headers, url)


def open_url(url: str, allow_http: bool) -> Any:
    """The open answer of a server. Raises OSError if there is none, Unreachable if it is redirected
    away from https.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "vidt"})
    return urllib.request.build_opener(SameSchemes(allow_http)).open(request, timeout=PATIENCE)


def fetch(url: str, *, allow_http: bool = False, most: int = MOST_IMAGE_BYTES) -> bytes:
    """The content of a URL. Raises Unreachable, naming it, if it cannot be downloaded completely,
    if it has more than `most` bytes, and for a scheme that is not allowed.
    """
    name = shown(url, 200)
    require_scheme(name, url, allow_http)
    try:
        with open_url(url, allow_http) as answer:
            promised = answer.headers.get("Content-Length")
            content: bytes = answer.read(most + 1)
        if len(content) > most:
            raise OSError(f"it has more than {most:,} bytes")
        # urllib treats a broken connection as the end of the file.
        if promised is not None and len(content) != int(promised):
            raise OSError(f"it broke off after {len(content)} of {promised} bytes")
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, UserError):
            raise
        raise Unreachable(
            f"{name} cannot be fetched ({error}); fetch it by hand and give its path"
        ) from error
    return content


def hash_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def require_hash(path: Path, wanted: str) -> None:
    """Raises OSError for a file of another SHA-256."""
    require_same_hash(hash_of(path), wanted)


def require_same_hash(found: str, wanted: str) -> None:
    """Raises OSError for two different SHA-256."""
    if found != wanted:
        raise OSError(f"its SHA-256 is {found}, not {wanted}")
