"""`report.html`: the results of a run on one page, in one file without scripts.

Python prepares plain data, the templates beside this file lay it out. The page is written at
evaluations, as rarely as its cost demands, and at the end. A page that cannot be made never ends a
run: one line of the log says why.
"""

import base64
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from accelerate import Accelerator
from accelerate.logging import get_logger
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from trainer.augmentation.preview import PREVIEW_NAME
from trainer.data.dataset_statistics import statistics_of
from trainer.readers.findings import Finding, read_findings
from trainer.readers.samples import SampleTable
from trainer.report import page_run
from trainer.report.console import duration, score
from trainer.report.page_curves import curves_of
from trainer.report.page_results import Scored, results_of
from trainer.report.pictures import as_jpeg
from trainer.report.plots import VARIABLES, Figure, as_svg, shortened
from trainer.report.progress import Progress, is_score
from trainer.report.run_history import RunHistory, evaluations_in
from trainer.report.worst_pictures import RIGHT, WRONG, worst_pictures
from trainer.scoring.evaluation import Evaluation
from trainer.scoring.mistakes import Diagnosis
from trainer.settings.config import TrainConfig
from trainer.settings.parsing import resolved
from vidt.atomic import atomic_write
from vidt.errors import counted
from vidt.model.config import ViDTConfig

PAGE_NAME = "report.html"
BESIDE_A_TRAINING = "evaluation.html"  # of an evaluation in the folder of a training
METRICS_NAME = "metrics.csv"
SHARE = 0.02  # of a run's time that pages may take before its end
FIRST_AFTER = 30.0  # seconds; a shorter run has one page, at its end

logger = get_logger(__name__)


@dataclass(frozen=True, eq=False)
class RunFacts:
    """The facts about a run that are known before it begins. The last split is the validation set;
    the training set, if there is one, precedes it.
    """

    folder: Path
    settings: Mapping[str, Any]  # of TrainConfig and ViDTConfig, by name
    splits: Sequence[SampleTable]
    findings: Sequence[Finding]
    environment: Mapping[str, str]
    plan: str = ""  # of --preset auto, in words


class ReportPage:
    """A `Report` that writes the page of a training. A run that breaks off sends no "end": `close`
    writes what the page lacks.

    Classes, confusions and images are those of the best evaluation of this start. A resumed run
    leaves the page of the start before as it is until it has evaluated.
    """

    def __init__(self, facts: RunFacts, clock: Callable[[], float] = time.monotonic) -> None:
        self._facts = facts
        self._clock = clock
        self._history = RunHistory(clock)
        self._scored: Scored | None = None
        self._shows_best = False
        self._behind = False
        self._written = -math.inf  # when
        self._cost = 0.0  # seconds, of the last page

    def __call__(self, progress: Progress) -> None:
        self._history(progress)
        self._behind = True
        if progress.event == "start" and progress.settings:
            self._facts = replace(self._facts, settings=progress.settings)
        if progress.event == "evaluation" and progress.diagnosis is not None:
            self._add_evaluation(progress, progress.diagnosis)
            since = self._clock() - self._written
            if self._history.seconds > FIRST_AFTER and since * SHARE > self._cost:
                self._write("running")
        elif progress.event == "end":
            self._write("finished")

    def close(self) -> None:
        """Harmless when repeated."""
        if self._behind:
            self._write("stopped")

    def _add_evaluation(self, progress: Progress, diagnosis: Diagnosis) -> None:
        if progress.best or not self._shows_best:
            kind = "best so far" if progress.best else "not the best of the run"
            what = f"evaluation after step {progress.step}, epoch {progress.epoch + 1} ({kind})"
            self._scored = Scored(progress.metrics, diagnosis, progress.worst, what)
            self._shows_best = progress.best

    def _write(self, state: str) -> None:
        began = self._clock()
        self._behind = False
        facts, history, scored = self._facts, self._history, self._scored
        path = facts.folder / PAGE_NAME
        if scored is None and history.first_step and path.exists():
            return
        _write_guarded(path, lambda: render_training(facts, history, scored, state))
        self._written = self._clock()
        self._cost = self._written - began


def page_of_training(
    config: TrainConfig,
    model_fields: Mapping[str, Any],
    train_set: SampleTable,
    val_set: SampleTable,
    accelerator: Accelerator,
    plan: str = "",
) -> ReportPage:
    """The page of a run whose `findings.csv` is in its folder already."""
    folder = Path(config.output_dir)
    findings = read_findings(folder / "findings.csv")
    settings, environment = resolved(config, model_fields), page_run.environment_of(accelerator)
    return ReportPage(RunFacts(folder, settings, (train_set, val_set), findings, environment, plan))


def write_evaluation_page(
    config: TrainConfig,
    model_config: ViDTConfig,
    val_set: SampleTable,
    findings: Sequence[Finding],
    evaluation: Evaluation,
    accelerator: Accelerator,
    seconds: float,
) -> None:
    """Writes the page of `--eval`, which took `seconds`; it does not replace a training's page."""
    settings = resolved(config, asdict(model_config))
    environment = page_run.environment_of(accelerator)
    facts = RunFacts(Path(config.output_dir), settings, (val_set,), findings, environment)

    def render() -> str:
        diagnosis = evaluation.diagnosis
        worst = worst_pictures(val_set, diagnosis.worst)
        what = f"evaluation of {config.load_from}"
        return render_evaluation(facts, Scored(evaluation.metrics, diagnosis, worst, what), seconds)

    trained = (facts.folder / METRICS_NAME).exists()
    path = facts.folder / (BESIDE_A_TRAINING if trained else PAGE_NAME)
    if _write_guarded(path, render):
        logger.info(f"report: {path}")


def _write_guarded(path: Path, render: Callable[[], str]) -> bool:
    """Whether the page was written; any error becomes a line of the log."""
    try:
        atomic_write(path, render().encode())
    except Exception as error:
        logger.warning(f"{path} could not be written: {type(error).__name__}: {error}")
        return False
    return True


def render_training(facts: RunFacts, history: RunHistory, scored: Scored | None, state: str) -> str:
    """The page as text; state: running, finished or stopped."""
    rows = evaluations_in(facts.folder / METRICS_NAME)
    best_by = facts.settings.get("best_by", "map50")
    return _render(
        facts,
        scored,
        kind="training",
        state=state,
        history=history,
        curves=curves_of(history, rows, best_by),
        best=max(rows, key=lambda row: _score(row, best_by), default=None),
        throughput=page_run.throughput_plot(history),
        speed=page_run.median_speed(history),
        times=page_run.training_times(history),
    )


def render_evaluation(facts: RunFacts, scored: Scored, seconds: float) -> str:
    """The page as text."""
    times = page_run.evaluation_times(seconds, len(facts.splits[-1]))
    return _render(facts, scored, kind="evaluation", state="finished", seconds=seconds, times=times)


def _render(facts: RunFacts, scored: Scored | None, **more: Any) -> str:
    statistics = [statistics_of(table) for table in facts.splits]
    results = results_of(scored, facts.splits[-1], statistics[-1].by_size) if scored else None
    changed, default = page_run.changed_and_default(facts.settings)
    page = environment().get_template("page.html")
    return page.render(
        facts=facts,
        title=facts.folder.resolve().name,
        now=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        scored=scored,
        results=results,
        splits=statistics,
        data=page_run.data_plots(statistics, int(facts.settings["det_token_num"])),
        findings=page_run.finding_groups(facts.findings),
        changed=changed,
        default=default,
        preview=facts.folder / PREVIEW_NAME,
        plan=facts.plan,
        **more,
    )


def _score(row: Mapping[str, float], name: str) -> float:
    value = float(row.get(name, -1.0))
    return value if is_score(value) else -1.0


def environment() -> Environment:
    """The jinja2 environment: it escapes text and rejects unknown names."""
    made = Environment(
        loader=PackageLoader("trainer.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"duration": duration, "score": score, "shortened": shortened}
    made.filters |= filters | {"jpeg": _data_url, "svg": _svg}
    made.filters["jpeg_file"] = lambda path: _jpeg_url(path.read_bytes())
    made.globals |= {"counted": counted, "variables": VARIABLES, "link": link}
    made.globals |= {"right": RIGHT, "wrong": WRONG}
    return made


def link(path: str, folder: Path) -> str:
    """The address of a file in a page in `folder`, relative so that both may move together."""
    file = Path(path).parent.resolve() / Path(path).name
    try:
        return quote(os.fsencode(os.path.relpath(file, folder.resolve())))
    except ValueError:  # on another drive
        return file.as_uri()


def _printable(value: Any) -> Any:
    """Shows file names that are not valid text, and class names that are not printable."""
    if hasattr(value, "__html__"):
        return value
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return "".join(each if each.isprintable() or each == "\n" else "\ufffd" for each in text)


def _svg(figure: Figure, description: str) -> Markup:
    return Markup(as_svg(figure, description))


def _data_url(image: Image.Image) -> Markup:
    return _jpeg_url(as_jpeg(image, quality=82))


def _jpeg_url(content: bytes) -> Markup:
    return Markup("data:image/jpeg;base64,") + base64.b64encode(content).decode()
