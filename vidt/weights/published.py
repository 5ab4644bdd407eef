"""The detectors that the authors of ViDT published, and the download of weights files.

Downloads are stored in torch hub's cache. They are atomic: a file is written under a temporary
name, its size and hash are checked if they are known, and then it is renamed. Its hash is noted
beside it, and a later use that finds another hash refuses the file.
"""

import hashlib
import http.client
import logging
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urlparse

from vidt.arguments import nearest
from vidt.atomic import atomic_file, atomic_write
from vidt.downloads import (
    CHUNK,
    Unreachable,
    hash_of,
    open_url,
    require_hash,
    require_same_hash,
    require_scheme,
)
from vidt.errors import UserError, shown
from vidt.weights.hub import HUB, fetch_from_hub

logger = logging.getLogger(__name__)

RELEASES = "https://github.com/naver-ai/vidt/releases/download"
BACKBONES = {
    "nano": "swin_nano",
    "tiny": "swin_tiny",
    "small": "swin_small",
    "base": "swin_base_win7_22k",
}
NUM_COCO_ROWS = 91
HASH = "sha256="  # of an address ending in #sha256=0123...
LEAST_BYTES = 2  # of a file for each of its parameters, as if it were in half precision


@cache
def coco_rows() -> tuple[str, ...]:
    """The class names of the released COCO heads, 91 rows: row i is category id i."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights  # takes a second

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    unused = ("__background__", "N/A")
    return tuple(f"unused {i}" if name in unused else name for i, name in enumerate(names))


@dataclass(frozen=True)
class Published:
    """One file of the release page; ap is COCO val2017 as published, in per cent."""

    backbone_name: str
    url: str
    ap: float | None  # None: not published for this file
    parameters: int | None = None  # None: read from the tensors of the file
    # Settings of `ViDTConfig` that differ from its defaults, without heads that a run may lack.
    architecture: Mapping[str, Any] = field(default_factory=dict)


def _table() -> dict[str, Published]:
    aps = {  # of nano, tiny, small and base, as far as they exist
        "vidt_{}_50": (40.4, 44.9, 47.4, 49.4),
        "vidt_{}_150": (42.6, 47.2, 48.8, 50.4),
        "vidt_distilled_{}": (41.8, 46.6, 49.2),
        "vidt_plus_{}": (45.3, 49.7, 51.2, 53.2),
        "vidt_plus_{}_optimized": (None, None, None),
    }
    files = {
        "vidt_{}_50": "v0.1-vidt/vidt_{}_50.pth",
        "vidt_{}_150": "v0.1-vidt/vidt_{}_150.pth",
        "vidt_distilled_{}": "v0.1-vidt-distil/vidt_{}_50.pth",
        "vidt_plus_{}": "v0.1-vidt-plus/vidt_plus_{}_det300.pth",
        "vidt_plus_{}_optimized": "v0.1-vidt-plus-optimized/vidt_plus_swin_{}_optimized.pth",
    }
    parameters = {  # of our detector with all heads and 91 classes
        "vidt_plus_{}_optimized": (None, None, None, None),
        "vidt_plus_{}": (17_488_039, 39_340_471, 61_842_631, 100_975_157),
    }
    plain = (15_529_797, 37_372_629, 59_874_789, 99_000_915)
    plus: dict[str, dict[str, Any]] = {
        "vidt_plus_{}_optimized": {"epff": True},
        "vidt_plus_{}": {"epff": True, "det_token_num": 300},
    }
    return {
        name.format(size): Published(
            BACKBONES[size],
            f"{RELEASES}/{files[name].format(size)}",
            ap,
            parameters.get(name, plain)[number],
            {"backbone_name": BACKBONES[size], **plus.get(name, {})},
        )
        for name, row in aps.items()
        for number, (size, ap) in enumerate(zip([*BACKBONES][: len(row)], row, strict=True))
    }


PUBLISHED = _table()
# By their names in the released flag --distil_model, and the ViDT+ detectors by similar names.
TEACHERS = {f"vidt_{size}": PUBLISHED[f"vidt_{size}_50"] for size in BACKBONES} | {
    f"vidt_plus_{size}": PUBLISHED[f"vidt_plus_{size}"] for size in BACKBONES
}


def published_for(backbone_name: str, *, method: str = "vidt", epff: bool = False) -> Published:
    """The published COCO detector of a backbone, trained for 150 epochs; of ViDT+ with `epff`.
    Raises UserError if there is none.
    """
    prefix, suffix = ("vidt_plus_", "") if epff else ("vidt_", "_150")
    files = [PUBLISHED[f"{prefix}{size}{suffix}"] for size in BACKBONES]
    found = {file.backbone_name: file for file in files}
    if method != "vidt" or backbone_name not in found:
        raise UserError(
            "pre_trained is coco; there are published detectors of method vidt for "
            f"{', '.join(found)}, not of {method} for {backbone_name}; choose one of these, or "
            "imagenet"
        )
    return found[backbone_name]


def is_remote(source: str) -> bool:
    """Whether `source` names a download: a URL, or a published model unless it is also a file."""
    return "://" in source or (source in PUBLISHED and not Path(source).exists())


def nearest_model(source: str) -> str:
    """A hint for a message on a file that does not exist; empty if no published model has a similar
    name.
    """
    similar = nearest(source, PUBLISHED)
    return f"; the published model of the nearest name is {similar}" if similar else ""


def cached_path(url: str) -> Path:
    """Where a download is stored, in torch hub's cache."""
    import torch  # takes seconds; help texts need only the table above

    # Many addresses end in best.safetensors: the file's name alone would mix them up.
    name = f"{zlib.crc32(url.encode()):08x}-{Path(urlparse(url).path).name}"
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def local_weights(
    source: str, flag: str | None = "--load_from", *, allow_http: bool = False
) -> Path:
    """The file of `source`: a path, a URL, hf://USER/NAME (see `vidt.weights.hub`), or the name of
    a published model. A URL is downloaded once, into torch hub's cache, and verified each time: by
    the hash that was noted when it was downloaded, and by that of a URL that ends in `#sha256=` and
    a hash. The size of a published model must be that of a file with its parameters. flag: of the
    path in a message; None: none.

    Raises Unreachable if a URL cannot be downloaded completely, if the file is another one than the
    hash or the size says, and for a URL other than https (and http, with `allow_http`).
    """
    if not is_remote(source):
        return Path(source)
    if source.startswith(HUB):
        return fetch_from_hub(source, allow_http=allow_http)
    address = PUBLISHED[source].url if source in PUBLISHED else source
    source = f"{source} ({address})" if source in PUBLISHED else source
    url, fragment = urldefrag(address)
    require_scheme(source, url, allow_http)
    if fragment and not re.fullmatch(f"{HASH}[0-9a-fA-F]{{64}}", fragment):
        raise Unreachable(
            f"{source}: #{shown(fragment, 100)} is no hash; write #{HASH} and 64 hexadecimal digits"
        )
    wanted = fragment.removeprefix(HASH).lower() or None
    path = cached_path(url)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _download(url, path, wanted, allow_http)
        noted = _noted_hash(path)
        for expected in {noted, wanted} - {None}:
            try:
                require_hash(path, str(expected))
            except OSError as error:
                raise OSError(
                    f"{error}; if you trust the new one, delete {path} and {_note_of(path).name} "
                    "beside it to fetch it again"
                ) from error
        if noted is None:
            atomic_write(_note_of(path), f"{hash_of(path)}\n".encode())
    except (OSError, ValueError, http.client.HTTPException) as error:
        pass_it = f"pass {flag} FILE" if flag else "pass its path"
        raise Unreachable(
            f"{source} cannot be fetched ({error}); fetch it by hand and {pass_it}"
        ) from error
    return path


def _download(url: str, path: Path, sha256: str | None, allow_http: bool) -> None:
    """Raises OSError if the file cannot be downloaded completely, Unreachable if it is redirected
    away from https.
    """
    with atomic_file(path) as file, open_url(url, allow_http) as answer:
        promised = answer.headers.get("Content-Length")
        megabytes = f" ({int(promised) / 1e6:.0f} MB)" if promised else ""
        logger.info(f"fetching {shown(url, 200)}{megabytes} into {path.parent}")
        digest = hashlib.sha256()
        while chunk := answer.read(CHUNK):
            digest.update(chunk)
            file.write(chunk)
        # urllib treats a broken connection as the end of the file.
        if promised is not None and file.tell() != int(promised):
            raise OSError(f"it broke off after {file.tell()} of {promised} bytes")
        _require_size(url, file.tell())
        if sha256 is not None:
            require_same_hash(digest.hexdigest(), sha256)


def _require_size(url: str, size: int) -> None:
    """Raises OSError for a file that is too small for the published model of this URL, such as a
    proxy's page. The exact sizes are not known.
    """
    for published in PUBLISHED.values():
        least = LEAST_BYTES * (published.parameters or 0)
        if published.url == url and size < least:
            raise OSError(f"it has {size:,} bytes, and this model needs {least:,} or more")


def _note_of(path: Path) -> Path:
    """The file beside a download that holds its hash."""
    return path.with_name(f"{path.name}.sha256")


def _noted_hash(path: Path) -> str | None:
    """The hash that was noted when the file was downloaded; None for a download of older code."""
    note = _note_of(path)
    return note.read_text(encoding="utf-8").strip() if note.exists() else None
