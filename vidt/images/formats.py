"""What a picture is, for readers of datasets, prediction and the dataset check: a file with one of
these endings, in any case, whose name does not start with a dot. All are formats that Pillow reads.

Of a file with several frames the first counts. Pixels become RGB with 8 bits a channel (see
`vidt.images.files`).
"""

import os

ENDINGS = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
        *(".png", ".apng", ".gif", ".bmp", ".dib", ".webp"),
        *(".tif", ".tiff"),
        *(".avif", ".avifs"),
        *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
        *(".ppm", ".pgm", ".pbm", ".pnm"),
    )
)
VIDEO_ENDINGS = frozenset(
    (
        *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".flv"),
        *(".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".3gp", ".ogv"),
    )
)


def ending(name: str) -> str:
    """The ending of a file name in lower case, with its dot; "" for none."""
    return os.path.splitext(name)[1].lower()


def is_picture(name: str) -> bool:
    """Whether a file of this name, without its folder, counts as a picture."""
    return not name.startswith(".") and ending(name) in ENDINGS
