"""The detectors that the authors of ViDT published, and how a file comes from an address.

Downloads lie in torch hub's cache. A file is there whole or not at all: it is written under a
temporary name, measured and hashed where the size or the hash is known, and only then renamed.
"""

import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.request
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urldefrag, urlparse

from vidt.errors import UserError

RELEASES = "https://github.com/naver-ai/vidt/releases/download"
BODIES = {
    "nano": "swin_nano",
    "tiny": "swin_tiny",
    "small": "swin_small",
    "base": "swin_base_win7_22k",
}
NUM_COCO_ROWS = 91
HASH = "sha256="  # of an address ending in #sha256=0123...
PATIENCE = 60  # seconds without a byte after which a download is given up
CHUNK = 1 << 20


@cache
def coco_rows() -> tuple[str, ...]:
    """The class names of the released COCO heads, 91 rows: row i is category id i."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights  # takes a second

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    unused = ("__background__", "N/A")
    return tuple(f"unused {i}" if name in unused else name for i, name in enumerate(names))


class Unreachable(UserError):
    """Weights that could not be downloaded; one line says how to do without."""


@dataclass(frozen=True)
class Published:
    """One file of the release page; ap is COCO val2017 as published, in per cent."""

    backbone_name: str
    url: str
    ap: float | None  # None: the release says nothing of this very file


def _table() -> dict[str, Published]:
    aps = {  # of nano, tiny, small and base, as far as there are such
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
    return {
        name.format(size): Published(BODIES[size], f"{RELEASES}/{files[name].format(size)}", ap)
        for name, row in aps.items()
        for size, ap in zip(list(BODIES)[: len(row)], row, strict=True)
    }


PUBLISHED = _table()
# By the names that the released flag --distil_model has for them, and their like of ViDT+.
TEACHERS = {f"vidt_{size}": PUBLISHED[f"vidt_{size}_50"] for size in BODIES} | {
    f"vidt_plus_{size}": PUBLISHED[f"vidt_plus_{size}"] for size in BODIES
}


def local_weights(source: str, flag: str = "--load_from") -> Path:
    """The file that `source`, a path or a URL, stands for. A URL is fetched once, into torch hub's
    cache. `#sha256=` and a hash behind a URL is verified, of a file in the cache too.

    Raises Unreachable for a URL that cannot be fetched whole.
    """
    if "://" not in source:
        return Path(source)
    import torch  # seconds that a help text, which needs the table above, does not spend

    url, fragment = urldefrag(source)
    wanted = fragment.removeprefix(HASH).lower() if fragment.startswith(HASH) else None
    # Many addresses end in best.safetensors: the file's name alone would mix them up.
    name = f"{zlib.crc32(url.encode()):08x}-{Path(urlparse(url).path).name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _download(url, path, wanted)
        elif wanted is not None:
            _require_hash(path, wanted)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unreachable(
            f"{source} cannot be fetched ({error}); fetch it by hand and pass {flag} FILE"
        ) from error
    return path


def _download(url: str, path: Path, sha256: str | None) -> None:
    """Raises OSError if the file does not come, or not whole."""
    request = urllib.request.Request(url, headers={"User-Agent": "vidt"})
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with (
            os.fdopen(handle, "wb") as file,
            urllib.request.urlopen(request, timeout=PATIENCE) as answer,
        ):
            promised = answer.headers.get("Content-Length")
            shutil.copyfileobj(answer, file, CHUNK)
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        # urllib takes a connection that was cut for the end of the file.
        if promised is not None and size != int(promised):
            raise OSError(f"it broke off after {size} of {promised} bytes")
        if sha256 is not None:
            _require_hash(temporary, sha256)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _require_hash(path: Path, wanted: str) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != wanted:
        raise OSError(f"its SHA-256 is {digest.hexdigest()}, not {wanted}")
