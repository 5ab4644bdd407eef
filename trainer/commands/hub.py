"""What others have trained, and what you share: `vidt models` lists the published models, and
`vidt push` uploads a weights file with a model card to the Hugging Face Hub.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.commands.command_flags import add_allow_http, command_parser, note, say
from trainer.commands.info import MAIN_METRICS
from vidt.arguments import OneLineParser
from vidt.errors import UserError, counted, escaped
from vidt.weights.hub import HUB, hub_address, upload_to_hub
from vidt.weights.published import PUBLISHED, Published, cached_path, local_weights

MODELS = """
Lists the detectors that the authors of ViDT published. vidt train --load_from, the commands that
take WEIGHTS, and vidt.load in Python take them by name. A model is downloaded when it is first
used; its size is checked, and its hash is noted and checked at each later use.
"""
MODELS_EXAMPLES = """
examples:
  vidt models
  vidt models --json
  vidt predict vidt_plus_tiny photos/
  vidt train --coco_path data/coco --load_from vidt_plus_tiny --output_dir output/tuned

output: name, backbone, AP on COCO val2017 as published, millions of parameters, the size of the
file in the cache, and the link.

exit code: 0 done, 2 a mistake that the line "error: ..." names.
"""
PUSH = """
Uploads a weights file to the Hugging Face Hub, as model.safetensors of USER/NAME, with a model card
made from its header: classes, data, metrics, settings. Nothing else is sent. The model is created
if it does not exist, private unless --public is given. Others then use it as hf://USER/NAME.
"""
PUSH_EXAMPLES = """
examples:
  vidt push output/best.safetensors USER/NAME --dry_run
      prints the card and sends nothing
  vidt push output/best.safetensors USER/NAME
  vidt predict hf://USER/NAME photo.jpg
  vidt train --data photos --load_from hf://USER/NAME --output_dir output/tuned

The token is that of "hf auth login" or HF_TOKEN. The card states no licence: add yours to it on the
model's page. A later push replaces only the part of the card between its two marks.

exit code: 0 done, 2 a mistake that the line "error: ..." names.
"""
HEADER = ("name", "backbone", "AP", "parameters", "cached", "link")
BEGIN, END = "<!-- vidt push: begin -->", "<!-- vidt push: end -->"
# No key `license`: that is the owner's to state.
FRONT = """---
library_name: vidt
pipeline_tag: object-detection
tags:
- vidt
- object-detection
---

"""


def models_flags() -> OneLineParser:
    parser = command_parser("models", MODELS, MODELS_EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def run_models(argv: Sequence[str]) -> int:
    """Raises UserError and OSError."""
    given = models_flags().parse_args(argv)
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


def push_flags() -> OneLineParser:
    parser = command_parser("push", PUSH, PUSH_EXAMPLES)
    parser.add_argument("weights", metavar="WEIGHTS", help="our .safetensors file")
    parser.add_argument("model", metavar="USER/NAME", help="your name or organisation, and a name")
    parser.add_argument("--public", action="store_true", help="let everybody see the model")
    parser.add_argument("--dry_run", action="store_true", help="print the card, send nothing")
    add_allow_http(parser)
    return parser


def run_push(argv: Sequence[str]) -> int:
    """Raises UserError and OSError."""
    given = push_flags().parse_args(argv)
    model = given.model.removeprefix(HUB)
    hub_address(f"{HUB}{model}")  # refuses what is no name
    path = local_weights(given.weights, flag=None, allow_http=given.allow_http)
    part = card_part(path, model)
    if given.dry_run:
        say(merged_card(None, part))
        return 0
    address = upload_to_hub(path, model, lambda old: merged_card(old, part), public=given.public)
    say(
        f"{address} ({'public' if given.public else 'private'}): model.safetensors, "
        f"{path.stat().st_size / 1e6:.1f} MB, and the model card README.md"
    )
    note("The card states no licence of its own: add yours to it on the model's page.")
    return 0


def merged_card(old: str | None, part: str) -> str:
    """The model card with a new part; what its owner wrote around the part, such as the licence,
    stays. A card without the two marks stays as it is.
    """
    if old is None:
        return f"{FRONT}{part}\n"
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        note(f"The model's card stays as it is: it has no {BEGIN} and {END} to write between.")
        return old
    return f"{before}{part}{after}"


def card_part(path: Path, model: str) -> str:
    """The text of the card, from the header of one of our weights files. Raises UnusableWeights
    for any other file.
    """
    from vidt.weights.checkpoint import load_model
    from vidt.weights.weights_file import is_safetensors

    if not is_safetensors(path):
        raise UserError(
            f"WEIGHTS {path} is no .safetensors file; a .pth becomes one by python -m vidt.convert"
        )
    detector, info = load_model(path)
    size = sum(each.numel() for each in detector.parameters())
    config, training = info.config, info.training
    sections = [
        f"# {model.partition('/')[2]}",
        f"A ViDT object detector: {config.method}, backbone {config.backbone_name}, "
        f"{size / 1e6:.1f} M parameters, {counted(len(info.class_names), 'class', 'classes')}. "
        f"Images are resized to {info.preprocessing.eval_size} pixels on their shorter side, at "
        f"most {info.preprocessing.max_size} on the longer.",
        "## Use",
        _usage(model),
        "## Classes",
        ", ".join(map(_text, info.class_names)),
        *_section("Metrics", ("metric", "value"), _scores(info.metrics)),
        *_section("Data", ("part", "source", "images", "boxes"), _data(training)),
        *_section("Training", ("what", "value"), _progress(training)),
        *_section("Settings", ("setting", "value"), _settings(training)),
        "## Licence",
        "Whoever published this model has stated none here. If you are the owner, add `license:` "
        "to the block at the top of this file.",
    ]
    return "\n\n".join([BEGIN, *sections, END])


def _usage(model: str) -> str:
    return f"""```python
import vidt

detector = vidt.load("{HUB}{model}")
detections = detector.predict("photo.jpg", threshold=0.3)
print(detections.names, detections.scores, detections.boxes)  # xyxy, pixels of the image
```

Or `vidt predict {HUB}{model} photo.jpg`, or start a training from it with
`vidt train --load_from {HUB}{model}`."""


def _section(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A heading and a table; nothing if there are no rows."""
    if not rows:
        return []
    lines = [header, ["---"] * len(header), *([_text(cell) for cell in row] for row in rows)]
    return [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]


def _text(value: Any) -> str:
    """A value of the header as Markdown that shows it and does nothing else."""
    plain = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    plain = escaped(plain).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{each}" if each in "\\`*_[]|#!~" else each for each in plain)


def _scores(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """The metrics when the weights were saved, by COCO's definitions."""
    found = {name: metrics.get(name, -1.0) for name in MAIN_METRICS}
    return [(name, f"{value:.3f}") for name, value in found.items() if value >= 0]


def _data(training: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (name, each["source"], f"{each['images']:,}", f"{each['boxes']:,}")
        for name, each in dict(training.get("data") or {}).items()
    ]


def _progress(training: Mapping[str, Any]) -> list[tuple[str, Any]]:
    known = {
        "epochs_done": "epochs",
        "steps_done": "steps",
        "images_per_step": "images per step",
        "date": "saved",
        "version": "version of vidt",
    }
    return [(text, training[name]) for name, text in known.items() if name in training]


def _settings(training: Mapping[str, Any]) -> list[tuple[str, Any]]:
    settings = dict(training.get("settings") or {})
    return [(name, value) for name, value in settings.items() if value is not None]
