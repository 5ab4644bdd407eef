"""Weights on the Hugging Face Hub, by the address hf://USER/NAME: fetched and uploaded by the
package huggingface_hub.

Its own settings hold: the token (HF_TOKEN, or that of `hf auth login`), the address of the Hub
(HF_ENDPOINT), the cache (HF_HOME) and HF_HUB_OFFLINE.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from vidt.downloads import Unreachable, require_hash, require_scheme
from vidt.errors import UserError, shown

HUB = "hf://"
WEIGHTS, CARD = "model.safetensors", "README.md"  # in a repository
MODEL = r"[\w.-]+/[\w.-]+"
REVISION = r"refs/(?:pr|convert)/[\w.-]+|[\w.-]+"  # a branch, tag or commit
FILE = r"(?:[\w-][\w.-]*/)*[\w-][\w.-]*\.safetensors"  # no part starts with a dot
ADDRESS = re.compile(f"{HUB}({MODEL})(?:@({REVISION}))?(?:/({FILE}))?", re.ASCII)
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
LOG_IN = "log in with hf auth login, or set HF_TOKEN"


@dataclass(frozen=True)
class HubAddress:
    """hf://USER/NAME, hf://USER/NAME@REVISION or hf://USER/NAME@REVISION/FILE.safetensors."""

    model: str
    revision: str | None = None  # None: the newest
    file: str = WEIGHTS


def hub_address(source: str) -> HubAddress:
    """Raises Unreachable for text that is no such address."""
    parts = ADDRESS.fullmatch(source)
    if parts is None:
        raise Unreachable(
            f"{shown(source, 200)} is no model of the Hub; write {HUB}USER/NAME, "
            f"{HUB}USER/NAME@REVISION or {HUB}USER/NAME/FILE.safetensors"
        )
    return HubAddress(parts[1], parts[2], parts[3] or WEIGHTS)


def fetch_from_hub(source: str, *, allow_http: bool = False) -> Path:
    """The weights of a model on the Hub, in huggingface_hub's cache, where they stay: without a
    network the cached ones are used. Only a safetensors file is fetched, and its SHA-256 must be
    the one that the Hub stated.

    Raises Unreachable, naming what to do, if it cannot be fetched, and UserError if it is no
    safetensors file.
    """
    address = hub_address(source)
    library = _library(source, allow_http)
    with _mendable_errors(address):
        path = Path(library.hf_hub_download(address.model, address.file, revision=address.revision))
        _require_stated_hash(path)
    with open(path, "rb") as file:
        if file.read(9)[8:9] != b"{":  # the length of the header, then JSON
            raise UserError(
                f"{source}: {address.file} is no safetensors file; nothing else is read"
            )
    return path


def upload_to_hub(
    weights: Path, model: str, card_for: Callable[[str | None], str], *, public: bool
) -> str:
    """Makes weights and model card one commit of USER/NAME, which is created if it does not exist.
    card_for: the new card, given the present one or None. Returns the address of the model's page.

    Raises UserError, naming what to do, if it cannot be uploaded, or if the model exists and is
    public although `public` is False, or the other way round.
    """
    address = hub_address(f"{HUB}{model}")
    if address != HubAddress(model):
        raise UserError(f"{shown(model)} is no name of a model; write USER/NAME")
    library = _library(model)
    token = library.get_token()
    if token is None:
        raise UserError(f"{model}: no token of the Hub is known; {LOG_IN}")
    hub = library.HfApi(token=token)
    with _mendable_errors(address):
        page = hub.create_repo(model, private=not public, exist_ok=True)
        present = hub.model_info(model)
        _require_visibility(model, bool(present.private), public)
        card = None
        if CARD in {each.rfilename for each in present.siblings or ()}:
            path = hub.hf_hub_download(model, CARD, revision=present.sha)
            card = Path(path).read_text(encoding="utf-8", errors="replace")
        files = {WEIGHTS: weights, CARD: card_for(card).encode()}
        adds = [library.CommitOperationAdd(name, content) for name, content in files.items()]
        hub.create_commit(model, adds, commit_message="Upload weights with vidt push")
    return str(page)


def _library(source: str, allow_http: bool = False) -> Any:
    """huggingface_hub, without the report on packages and machine that it sends along. Raises
    Unreachable if it would send the token unencrypted to another machine.
    """
    import huggingface_hub  # takes a second
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True
    endpoint = constants.ENDPOINT
    if urlparse(endpoint).hostname not in THIS_MACHINE:
        require_scheme(f"{source} at HF_ENDPOINT {shown(endpoint)}", endpoint, allow_http)
    return huggingface_hub


def _require_visibility(model: str, private: bool, public: bool) -> None:
    if private and public:
        raise UserError(f"{model} exists and is private; omit --public, or change its settings")
    if not private and not public:
        raise UserError(f"{model} exists and is public; pass --public to publish these weights too")


def _require_stated_hash(path: Path) -> None:
    """Checks a file of the cache. There it is a link to a file whose name is the SHA-256 that the
    Hub stated, if Git LFS or Xet stores it; a file system without links does not keep the name.
    Raises Unreachable for another SHA-256.
    """
    stated = Path(os.readlink(path)).name if path.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{64}", stated):
        try:
            require_hash(path, stated)
        except OSError as error:
            file = path.resolve()
            raise Unreachable(f"{file}: {error}; delete it to fetch it again") from error


def _utils() -> Any:
    return import_module("huggingface_hub.utils")  # which takes a second


@contextmanager
def _mendable_errors(address: HubAddress) -> Iterator[None]:
    """Turns errors of huggingface_hub, whose messages have many lines, into Unreachable."""
    # HfHubHTTPError's bases include the one of the HTTP library, whichever it is.
    bases: tuple[Any, ...] = _utils().HfHubHTTPError.__bases__
    failures: tuple[type[Exception], ...] = (OSError, ValueError, *bases)
    try:
        yield
    except UserError:
        raise
    except failures as error:
        raise Unreachable(f"{HUB}{address.model}: {_reason(error, address)}") from error


def _reason(error: Exception, address: HubAddress) -> str:
    """What went wrong and what to do, in one line."""
    utils = _utils()
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, utils.GatedRepoError):
        return "its owner grants access; ask for it on the model's page, and then " + LOG_IN
    if isinstance(error, utils.RepositoryNotFoundError):
        return f"there is no such model, or it is private; check the name, or {LOG_IN}"
    if isinstance(error, utils.RevisionNotFoundError):
        return f"it has no revision {address.revision}; omit it for the newest"
    if isinstance(error, utils.LocalEntryNotFoundError):
        return "the Hub cannot be reached and nothing is cached; check the network, or pass a file"
    if isinstance(error, utils.EntryNotFoundError):
        return f"it has no {address.file}; name its file: {HUB}{address.model}/FILE.safetensors"
    if status == 401:
        return f"the Hub refuses the token; {LOG_IN}"
    if status == 403:
        return f"the token may not do this (status 403); use one that may write to {address.model}"
    if status is not None:
        return f"the Hub answers with status {status}; try again later"
    # The text of an error may hold the token of a request that cannot be sent.
    text = "" if "earer" in str(error) else f": {shown(str(error).partition(chr(10))[0], 200)}"
    return f"{type(error).__name__}{text}; check the network and HF_ENDPOINT, or pass a file"
