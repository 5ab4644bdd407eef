"""`report.html`: all that a run is judged by on one page, in one file that needs no server.

It is written anew while the run goes on, as seldom as its cost asks for, and at the end. A page
that cannot be made never ends a run: one line of the log says why.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger

from trainer.data.dataset_statistics import Statistics, statistics_of
from trainer.readers.findings import Finding, read_findings
from trainer.readers.samples import SampleTable
from trainer.report.console import duration
from trainer.report.environment import environment_of
from trainer.report.page_curves import NOTHING_YET, curves_section
from trainer.report.page_parts import Html, element, joined, number, page, tiles
from trainer.report.page_results import (
    Scored,
    classes_section,
    confusion_section,
    remarks,
    sizes_section,
    worst_section,
)
from trainer.report.page_run import (
    data_section,
    evaluation_time_section,
    findings_section,
    settings_section,
    time_section,
)
from trainer.report.progress import Progress, is_score
from trainer.report.run_history import History, evaluations_in
from trainer.report.worst_pictures import worst_pictures
from trainer.scoring.evaluation import Evaluation
from trainer.scoring.mistakes import Diagnosis
from trainer.settings.config import TrainConfig, resolved
from trainer.settings.wording import counted
from vidt.atomic import atomic_write
from vidt.model.config import ViDTConfig

PAGE_NAME = "report.html"
BESIDE_A_TRAINING = "evaluation.html"  # of an evaluation in the folder of a training
METRICS_NAME = "metrics.csv"
SHARE = 0.02  # of a run's time that pages may take before its end
FIRST_AFTER = 30.0  # seconds; a run shorter than that has one page, at its end

logger = get_logger(__name__)


@dataclass(frozen=True, eq=False)
class RunFacts:
    """What is known of a run before it begins. The last split is validated on; one that is learnt
    from stands before it.
    """

    folder: Path
    settings: Mapping[str, Any]  # of both owners, by name
    splits: Sequence[SampleTable]
    findings: Sequence[Finding]
    environment: Mapping[str, str]


class ReportPage:
    """Writes the page of a training; a `Report`. `close` writes what is not on it yet: a run that
    breaks off sends no "end".

    The classes, confusions and images shown are those of the best evaluation of this start, whose
    weights are kept. Until a resumed run has evaluated, the page of the start before is left.
    """

    def __init__(self, facts: RunFacts, clock: Callable[[], float] = time.monotonic) -> None:
        self._facts = facts
        self._clock = clock
        self._history = History(clock)
        self._scored: Scored | None = None
        self._shows_best = False
        self._behind = False
        self._written = -math.inf  # when
        self._cost = 0.0  # seconds, of the last page

    def __call__(self, progress: Progress) -> None:
        self._history(progress)
        self._behind = True
        if progress.event == "evaluation" and progress.diagnosis is not None:
            self._note(progress, progress.diagnosis)
            since = self._clock() - self._written
            if self._history.seconds > FIRST_AFTER and since * SHARE > self._cost:
                self._write("running")
        elif progress.event == "end":
            self._write("finished")

    def close(self) -> None:
        """Harmless when repeated."""
        if self._behind:
            self._write("stopped")

    def _note(self, progress: Progress, diagnosis: Diagnosis) -> None:
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
) -> ReportPage:
    """The reporter of a run whose findings lie in its folder."""
    folder = Path(config.output_dir)
    facts = RunFacts(
        folder=folder,
        settings=resolved(config, model_fields),
        splits=(train_set, val_set),
        findings=read_findings(folder / "findings.csv"),
        environment=environment_of(accelerator),
    )
    return ReportPage(facts)


def write_evaluation_page(
    config: TrainConfig,
    model_config: ViDTConfig,
    val_set: SampleTable,
    findings: Sequence[Finding],
    evaluation: Evaluation,
    accelerator: Accelerator,
    seconds: float,
) -> None:
    """The page of `--eval`, which took so many seconds; that of a training is left alone."""
    settings = resolved(config, asdict(model_config))
    environment = environment_of(accelerator)
    facts = RunFacts(Path(config.output_dir), settings, (val_set,), findings, environment)

    def render() -> str:
        diagnosis = evaluation.diagnosis
        worst = worst_pictures(val_set, diagnosis.worst)
        what = f"evaluation of {config.load_from}"
        scored = Scored(evaluation.metrics, diagnosis, worst, what)
        return render_evaluation(facts, scored, seconds)

    trained = (facts.folder / METRICS_NAME).exists()
    path = facts.folder / (BESIDE_A_TRAINING if trained else PAGE_NAME)
    if _write_guarded(path, render):
        logger.info(f"all on one page: {path}")


def _write_guarded(path: Path, render: Callable[[], str]) -> bool:
    """Whether it was written. What goes wrong is a line of the log: a run matters more than its
    page.
    """
    try:
        atomic_write(path, render().encode())
    except Exception as error:
        logger.warning(f"{path} could not be written: {type(error).__name__}: {error}")
        return False
    return True


def render_training(facts: RunFacts, history: History, scored: Scored | None, state: str) -> str:
    """The page as text; state: running, finished or stopped."""
    rows = evaluations_in(facts.folder / METRICS_NAME)
    last = history.last
    where = ""
    if last is not None:
        where = f" at step {last.step:,} of {last.total_steps:,}"
        where += f", epoch {last.epoch + 1} of {last.total_epochs}" if last.total_epochs else ""
    # A run that is killed cannot take back what its page says.
    written = f"written {_now()}"
    if state == "running":
        written += "; while the run goes on it is written anew at evaluations, and at the end"
    where += f"; {written}"
    best = max(rows, key=lambda row: _score(row, "map50"), default=None)
    numbers: Mapping[str, float] = best or (scored.metrics if scored else {})
    when = f"best, epoch {best['epoch']:.0f}" if best else "last evaluation"
    entries = _score_tiles(numbers, when, scored)
    speed = history.of("images_per_second")
    if speed:
        entries.append(("Throughput", f"{speed[-1]:.3g}/s", "training images, last log line"))
    entries.append(("Time", duration(history.seconds), "since this start"))
    return _page(
        facts,
        "training",
        (state, where),
        entries,
        scored,
        [("curves", "Curves", curves_section(history, rows, ended=state == "finished"))],
        time_section(history),
    )


def render_evaluation(facts: RunFacts, scored: Scored, seconds: float) -> str:
    """The page as text."""
    entries = _score_tiles(scored.metrics, "validation", scored)
    entries.append(("Time", duration(seconds), "predicting and scoring"))
    number_of_images = len(facts.splits[-1])
    where = f" on {counted(number_of_images, 'image')}"
    time_part = evaluation_time_section(seconds, number_of_images)
    return _page(facts, "evaluation", ("finished", where), entries, scored, [], time_part)


def _page(
    facts: RunFacts,
    kind: str,
    state: tuple[str, str],
    entries: Sequence[tuple[str, str, str]],
    scored: Scored | None,
    first: Sequence[tuple[str, str, Html]],
    time_part: Html,
) -> str:
    """Sections as key, name in the contents, and themselves."""
    statistics = [statistics_of(table) for table in facts.splits]
    sections = list(first)
    if scored is not None:
        sections += [
            ("classes", "Classes and thresholds", classes_section(scored)),
            ("confusion", "Confusion", confusion_section(scored)),
            ("sizes", "Sizes", sizes_section(scored, statistics[-1].by_size)),
            ("worst", "Worst images", worst_section(scored, facts.splits[-1])),
        ]
    num_queries = int(facts.settings["det_token_num"])
    sections += [
        ("data", "Dataset", data_section(statistics, num_queries)),
        ("findings", "Findings", findings_section(facts.findings)),
        ("settings", "Configuration", settings_section(facts.settings, facts.environment)),
        ("time", "Time", time_part),
    ]
    links = [element("a", name, href=f"#{key}") for key, name, _ in sections]
    title = facts.folder.resolve().name
    return page(
        f"{title}: {kind}",
        _head(facts, kind, statistics[0], state),
        element("nav", *links, class_="contents"),
        tiles(entries),
        _remarks(scored),
        *(content for _, _, content in sections),
        element("footer", _made(facts)),
    )


def _head(facts: RunFacts, kind: str, data: Statistics, state: tuple[str, str]) -> Html:
    settings = facts.settings
    what = (
        f"{settings['method']} with {settings['backbone_name']}, {settings['det_token_num']} "
        f"queries, {settings['eval_size']} pixels; "
        f"{counted(data.num_images, 'image')} of {data.source}, "
        f"{counted(len(data.class_names), 'class', 'classes')}"
    )
    chip = element("span", state[0], class_=f"chip {state[0]}")
    return element(
        "header",
        element("p", f"{kind} report", class_="kicker"),
        element("h1", facts.folder.resolve().name),
        element("p", what, class_="subtitle"),
        element("p", chip, state[1], class_="subtitle"),
    )


def _score_tiles(
    numbers: Mapping[str, float], when: str, scored: Scored | None
) -> list[tuple[str, str, str]]:
    if not numbers:
        return []
    entries = [
        ("AP50", number(_score(numbers, "map50")), when),
        ("AP", number(_score(numbers, "map")), "mean over IoU 0.5 to 0.95"),
    ]
    best = scored.diagnosis.together.best if scored else None
    if best is not None:
        entries.append(("F1", number(best.f1), f"at threshold {best.threshold:.2f}"))
    return entries


def _score(numbers: Mapping[str, float], name: str) -> float:
    value = float(numbers.get(name, -1.0))
    return value if is_score(value) else -1.0


def _remarks(scored: Scored | None) -> Html:
    if scored is None:
        return element("div", element("p", NOTHING_YET), class_="remarks")
    items = [element("li", each) for each in remarks(scored)]
    what = f"Classes, confusions, sizes and images below are of the {scored.what}."
    return element(
        "div",
        element("h3", "What stands out") if items else "",
        element("ul", *items) if items else "",
        element("p", what, class_="muted"),
        class_="remarks",
    )


def _made(facts: RunFacts) -> Html:
    return joined("Made ", _now(), " in ", element("code", facts.folder), ".")


def _now() -> str:
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
