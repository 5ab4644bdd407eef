"""`vidt plan`: the settings that `--preset auto` chooses for a dataset, and why."""

import json
from collections.abc import Sequence

from trainer.commands.command_flags import Stages, command_parser, say
from trainer.settings.parsing import fixed_settings, parse
from vidt.arguments import HELP, OneLineParser

SUMMARY = """
Reads a dataset's annotations and prints the settings that vidt train --preset auto would choose for
it on this machine, each with its reason. It trains nothing. It fetches the ImageNet weights from
which that training would start, if it can.
"""
EXAMPLES = """
examples:
  vidt plan photos/
  vidt plan data/yolo --hours 0.5
  vidt plan photos/ --hours 0.5 --eval_size 320 --json

Further flags are those of vidt train; a setting that is given wins over the plan.

as JSON: settings (name to value), plan (lines of text).

exit code: 0 done, 2 a mistake, which the line "error: ..." names.
"""
OWN_FLAGS = (*HELP, "--json")


def flags() -> OneLineParser:
    parser = command_parser("plan", SUMMARY, EXAMPLES)
    parser.add_argument(
        "data", metavar="DATA", help="folder of the dataset, or its annotation file; comes first"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def run(argv: Sequence[str]) -> int:
    """Raises UserError and OSError."""
    first, *rest = argv or ("",)
    given = flags().parse_args([first, *(word for word in rest if word in OWN_FLAGS)])
    words = ["--data", given.data, "--preset", "auto"]
    words += [word for word in rest if word not in OWN_FLAGS]
    config, fields = parse(words)

    from trainer.data.dataset_statistics import plan_of
    from trainer.data.load import read_parts
    from trainer.loop.start import settled

    config, fields, fixed = settled(config, fields, fixed_settings(words))
    with Stages() as tell:
        data = read_parts(config, num_queries=None, num_classes=None, tell=tell)
    config, fields, plan = plan_of(config, fields, fixed, data.train)
    if given.json:
        settings = {**vars(config), **fields}
        say(json.dumps({"settings": settings, "plan": plan.splitlines()}, indent=1))
    else:
        say(plan)
    return 0
