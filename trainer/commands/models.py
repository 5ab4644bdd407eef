"""`vidt models`: the published models, and which of them are in the cache."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.commands.command_flags import command_parser, say
from vidt.arguments import OneLineParser
from vidt.weights.published import PUBLISHED, Published, cached_path

SUMMARY = """
Lists the detectors that the authors of ViDT published. vidt train --load_from, the commands that
take WEIGHTS, and vidt.load in Python take them by name. A model is downloaded when it is first
used; its size is checked, and its hash is noted and checked at each later use.
"""
EXAMPLES = """
examples:
  vidt models
  vidt models --json
  vidt predict vidt_plus_tiny photos/
  vidt train --coco_path data/coco --load_from vidt_plus_tiny --output_dir output/tuned

output: name, backbone, AP on COCO val2017 as published, millions of parameters, the size of the
file in the cache, and the link.

exit code: 0 done, 2 a mistake that the line "error: ..." names.
"""
HEADER = ("name", "backbone", "AP", "parameters", "cached", "link")


def flags() -> OneLineParser:
    parser = command_parser("models", SUMMARY, EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def run(argv: Sequence[str]) -> int:
    """Raises UserError and OSError."""
    given = flags().parse_args(argv)
    models = [facts(name, published) for name, published in PUBLISHED.items()]
    say(json.dumps(models, indent=1) if given.json else page(models))
    return 0


def facts(name: str, published: Published) -> dict[str, Any]:
    """What is known of a published model; `file` and `bytes` are None unless it is cached."""
    path = cached_path(published.url)
    cached = path if path.is_file() else None
    return {
        "name": name,
        "backbone": published.backbone_name,
        "ap": published.ap,
        "parameters": published.parameters,
        "file": str(cached) if cached else None,
        "bytes": cached.stat().st_size if cached else None,
        "url": published.url,
    }


def page(models: Sequence[dict[str, Any]]) -> str:
    """A table of the models, and where the cache is."""
    rows = [HEADER, *map(_row, models)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    cache = Path(cached_path(models[0]["url"])).parent
    return "\n".join([*lines, "", f"cache: {cache}"])


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    ap, parameters, size = model["ap"], model["parameters"], model["bytes"]
    return (
        model["name"],
        model["backbone"],
        "-" if ap is None else f"{ap:.1f}",
        "-" if parameters is None else f"{parameters / 1e6:.1f} M",
        "no" if size is None else f"{size / 1e6:.0f} MB",
        model["url"],
    )
