"""report.html: one file with all sections whatever the run was, which no dataset breaks."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from PIL import Image
from simulated import (
    at_the_end,
    evaluation_of,
    events_of_a_run,
    found_in,
    nothing_in,
    pictures_of,
)
from tiny_runs import Learnt, argv, cpu, main_here

from trainer.readers.findings import Finding
from trainer.readers.run_lengths import rectangle
from trainer.readers.samples import SampleTable
from trainer.report.page import (
    FIRST_AFTER,
    ReportPage,
    RunFacts,
    render_training,
    write_evaluation_page,
)
from trainer.report.page_curves import curves_of
from trainer.report.page_run import MOST_FINDINGS, finding_groups
from trainer.report.progress import CsvLog, Progress
from trainer.report.run_history import RunHistory
from trainer.settings.parsing import parse, resolved
from vidt.model.config import ViDTConfig

NAMES = ("cat", "dog", "bird")
HOSTILE = '<script>alert(1)</script> & "it\'s" $x^2$ \x07'
RESULTS = {"classes", "confusion", "sizes", "worst"}
ALWAYS = {"data", "findings", "settings", "time"}
MOST_BYTES = 3_000_000
VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Reads a page, and fails where elements do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.sections: set[str] = set()
        self.fetched: list[str] = []
        self.linked: list[str] = []  # files, by the reader's click
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(self.text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        if tag == "section":
            self.sections.add(given["id"] or "")
        if tag == "a" and not (given["href"] or "").startswith("#"):
            self.linked.append(given.pop("href") or "")
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            if name in given:
                self.fetched.append(given[name] or "")
        assert not [name for name in given if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def words_shown(self) -> str:
        return " ".join(" ".join(self.words).split())

    def check(self, sections: set[str]) -> None:
        assert self.sections == sections
        assert "script" not in self.tags and "iframe" not in self.tags
        assert [each for each in self.fetched if not each.startswith(("#", "data:"))] == []
        assert "default-src 'none'" in self.text
        assert len(self.text.encode()) < MOST_BYTES
        assert not re.search(r"\bnan\b", self.words_shown)


def facts_of(
    folder: Path, splits: Sequence[SampleTable], findings: Sequence[Finding] = ()
) -> RunFacts:
    config, fields = parse(["--output_dir", str(folder)])
    fields["num_classes"] = len(splits[0].class_names)
    settings = resolved(config, fields)
    return RunFacts(folder, settings, splits, findings, {"device": "cpu"})


def page_of_run(folder: Path, facts: RunFacts, events: Sequence[Progress]) -> Page:
    log, page = CsvLog(folder / "metrics.csv"), ReportPage(facts)
    for event in events:
        log(event)
        page(event)
    page.close()
    return Page(folder / "report.html")


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> SampleTable:
    return pictures_of(tmp_path_factory.mktemp("data") / "val", NAMES)


def test_a_finished_run(val: SampleTable, tmp_path: Path) -> None:
    events = events_of_a_run(val, (0.2, 0.6, 0.9))
    finding = Finding("degenerate box", "warning", "dropped", "corners", "val", "a.png", 3, 4)
    facts = facts_of(tmp_path, (val, val), [finding])
    page = page_of_run(tmp_path, facts, [*events, at_the_end(events[-1])])
    page.check(RESULTS | ALWAYS | {"curves"})
    words = page.words_shown
    last = events[-1]
    assert last.diagnosis is not None and last.diagnosis.together.best is not None
    assert "finished at step 30 of 30, epoch 3 of 3" in words
    assert f"AP50 {last.metrics['map50']:.3f} best, epoch 3" in words
    assert f"at threshold {last.diagnosis.together.best.threshold:.2f}" in words
    assert "warning degenerate box , dropped: 1 val, a.png, image 3, annotation 4" in words
    assert "--output_dir" in words and "device" in words
    assert page.text.count("<img") == 2 * len(last.diagnosis.worst) > 10
    assert page.text.count("<svg") == 12


def test_a_preview_of_the_augmentation_is_shown(val: SampleTable, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "preview.jpg")
    page = page_of_run(tmp_path, facts_of(tmp_path, (val, val)), events_of_a_run(val, (0.2,)))
    page.check(RESULTS | ALWAYS | {"curves", "preview"})


def test_what_stands_out_says_of_how_many_boxes_it_speaks(val: SampleTable, tmp_path: Path) -> None:
    events = events_of_a_run(val, (0.6,))
    words = page_of_run(tmp_path, facts_of(tmp_path, (val, val)), events).words_shown
    boxes = {name: int((val.labels == label).sum()) for label, name in enumerate(NAMES)}
    metrics = events[-1].metrics
    rising = sorted(NAMES, key=lambda name: metrics[f"ap50/{name}"])
    for name, word in ((rising[0], "weakest class"), (rising[-1], "strongest")):
        told = (
            rf"{name} (is )?the {word} \((AP50 )?{metrics[f'ap50/{name}']:.2f}, {boxes[name]} true"
        )
        assert re.search(told, words), told
    assert re.search(
        r"(Small|Medium|Large) objects have the lowest AP by size \(.*?, \d+ true", words
    )


def test_with_one_class_there_is_no_card_about_classes(tmp_path: Path) -> None:
    table = pictures_of(tmp_path / "val", ("cat",))
    events = events_of_a_run(table, (0.4, 0.8))
    page = page_of_run(tmp_path, facts_of(tmp_path, (table, table)), events)
    page.check(RESULTS | ALWAYS | {"curves"})
    for title in ("AP50 of each class", "True boxes of each class", "Most often confused"):
        assert title not in page.words_shown
    assert "weakest class" not in page.words_shown
    assert page.text.count('class="empty"') == 1 and "No findings." in page.words_shown


def test_the_throughput_is_the_median(val: SampleTable, tmp_path: Path) -> None:
    speeds = iter((9.0, 11.0, 1.0, 30.0, 10.0))
    events = [
        replace(each, metrics={**each.metrics, "images_per_second": next(speeds)})
        if each.event == "step"
        else each
        for each in events_of_a_run(val, (0.5,))
    ]
    words = page_of_run(tmp_path, facts_of(tmp_path, (val, val)), events).words_shown
    assert "Throughput 10/s training images, median" in words
    assert "training, median 10 images/s" in words


def test_the_worst_images_are_linked(tmp_path: Path) -> None:
    """By their place relative to the page, escaped."""
    table = pictures_of(tmp_path / 'a "b" #1', NAMES)
    folder = tmp_path / "run"
    folder.mkdir()
    events = events_of_a_run(table, (0.3,))
    page = page_of_run(folder, facts_of(folder, (table, table)), events)
    worst = events[-1].diagnosis.worst  # type: ignore[union-attr]
    assert len(page.linked) == len(worst) > 0
    for address, judged in zip(page.linked, worst, strict=True):
        assert address.startswith("../a%20%22b%22%20%231/")
        target = (folder / unquote(address)).resolve()
        assert target == Path(table.path(judged.index)).resolve() and target.is_file()


def test_what_more_epochs_would_do_is_said_at_the_end(val: SampleTable, tmp_path: Path) -> None:
    """A page on the way says when it was written: a killed run leaves it as it is."""
    events = events_of_a_run(val, (0.2, 0.6, 0.9))
    (tmp_path / "metrics.csv").write_text("step,epoch,loss,map50\n10,1,3,0.1\n20,2,2,0.2\n")
    facts, history = facts_of(tmp_path, (val, val)), RunHistory()
    for event in events[:-2]:
        history(event)
    pages = {}
    for state in ("running", "stopped", "finished"):
        path = tmp_path / f"{state}.html"
        path.write_text(render_training(facts, history, None, state))
        pages[state] = Page(path).words_shown
    advice = {state: words.count("more epochs") for state, words in pages.items()}
    assert advice["running"] == advice["stopped"] == advice["finished"] - 2
    when = r"at step 30 of 30, epoch 3 of 3 *; written 20\d\d-\d\d-\d\d \d\d:\d\d"
    assert all(re.search(f"{state} {when}", words) for state, words in pages.items())
    assert "rewritten" in pages["running"]
    assert "rewritten" not in pages["finished"] + pages["stopped"]


def test_means_are_drawn_at_the_evaluation_that_ends_them() -> None:
    """In both plots of losses, and also of a run without a log line."""
    rows = [{"step": 100.0 * n, "loss": 3.0 / n, "loss_ce": 1.0 / n} for n in (1, 2, 3)]
    for shown in (rows, rows[:1]):
        curves = curves_of(RunHistory(), shown)
        for name in ("loss", "terms"):
            (line,) = curves[name].figure.axes[0].lines
            assert list(line.get_xdata()) == [row["step"] for row in shown]


def test_a_run_before_its_first_evaluation(val: SampleTable, tmp_path: Path) -> None:
    events = [each for each in events_of_a_run(val, (0.5,)) if each.event in ("start", "step")]
    page = page_of_run(tmp_path, facts_of(tmp_path, (val, val)), events)
    page.check(ALWAYS | {"curves"})
    assert "No evaluation yet" in page.words_shown and "stopped" in page.words_shown


def test_a_run_that_broke_off_before_its_first_step(val: SampleTable, tmp_path: Path) -> None:
    page = page_of_run(tmp_path, facts_of(tmp_path, (val, val)), events_of_a_run(val, ()))
    page.check(ALWAYS | {"curves"})


@pytest.mark.parametrize("num_classes", [1, 500])
def test_one_class_and_five_hundred(num_classes: int, tmp_path: Path) -> None:
    names = [f"{number} {HOSTILE} a name longer than any label" for number in range(num_classes)]
    samples = pictures_of(tmp_path / "val", names, count=40)
    facts = facts_of(tmp_path, (samples, samples))
    page = page_of_run(tmp_path, facts, events_of_a_run(samples, (0.8,)))
    page.check(RESULTS | ALWAYS | {"curves"})
    assert all(f"{number} <script>" in page.words_shown for number in range(num_classes))
    if num_classes > 1:
        assert "the other 494 classes" in page.words_shown
        assert "488 others" in page.words_shown


def test_nothing_found_and_nothing_to_score(val: SampleTable, tmp_path: Path) -> None:
    """No box at all; and -1 and NaN for every number."""
    evaluation = evaluation_of(val, nothing_in(val))
    for number, value in enumerate((None, -1.0, float("nan"))):
        folder = tmp_path / str(number)
        metrics = evaluation.metrics if value is None else dict.fromkeys(evaluation.metrics, value)
        events = [
            Progress("start", 0, 0, 0, 10),
            Progress(
                "evaluation", 1, 0, 10, 10, metrics, best=True, diagnosis=evaluation.diagnosis
            ),
        ]
        events[1] = replace(events[1], diagnosis=replace(evaluation.diagnosis, worst=()))
        page = page_of_run(folder, facts_of(folder, (val, val)), events)
        page.check(RESULTS | ALWAYS | {"curves"})
        assert page.text.count('class="empty"') >= 2


def test_images_without_any_box(tmp_path: Path) -> None:
    samples = pictures_of(tmp_path / "val", NAMES, count=5)
    empty = samples.keep_boxes(torch.zeros(len(samples.labels), dtype=torch.bool))
    for found in (nothing_in(empty), found_in(empty, 0.0)):
        evaluation = evaluation_of(empty, found)
        assert evaluation.diagnosis.together.best is None
        event = Progress("evaluation", 1, 0, 10, 10, evaluation.metrics)
        event = replace(event, diagnosis=replace(evaluation.diagnosis, worst=()))
        page = page_of_run(tmp_path, facts_of(tmp_path, (empty, empty)), [event])
        page.check(RESULTS | ALWAYS | {"curves"})


def test_masks(val: SampleTable, tmp_path: Path) -> None:
    drawn = [
        replace(each, masks=tuple(rectangle(box, each.size) for box in each.boxes.tolist()))
        for each in val
    ]
    samples = SampleTable.from_samples(drawn, NAMES)
    events = events_of_a_run(samples, (0.4, 0.8))
    masks = {"segm_map50": 0.321, "segm_map": 0.123, "segm_map_small": -1.0}
    events = [
        replace(each, metrics={**each.metrics, **masks}) if each.diagnosis else each
        for each in events
    ]
    page = page_of_run(tmp_path, facts_of(tmp_path, (samples, samples)), events)
    page.check(RESULTS | ALWAYS | {"curves"})
    assert "AP50 of masks 0.321" in page.words_shown


def test_a_resumed_run_shows_the_evaluations_of_both_starts(
    val: SampleTable, tmp_path: Path
) -> None:
    facts = facts_of(tmp_path, (val, val))
    page_of_run(tmp_path, facts, events_of_a_run(val, (0.3, 0.95)))
    later = events_of_a_run(val, (0.5,), first_step=20)
    worse = [replace(each, best=False) for each in later]
    words = page_of_run(tmp_path, facts, worse).words_shown
    assert "resumed after step 20" in words
    assert "best, epoch 2" in words and "1 later evaluation" in words
    assert "after step 30, epoch 3 (not the best of the run)" in words


def test_a_resumed_run_leaves_the_page_until_it_has_evaluated(
    val: SampleTable, tmp_path: Path
) -> None:
    facts = facts_of(tmp_path, (val, val))
    before = page_of_run(tmp_path, facts, events_of_a_run(val, (0.3,)))
    later = [each for each in events_of_a_run(val, (0.5,), first_step=10) if not each.diagnosis]
    assert page_of_run(tmp_path, facts, later).text == before.text


def test_what_is_shown_is_of_the_best_evaluation(val: SampleTable, tmp_path: Path) -> None:
    words = page_of_run(
        tmp_path, facts_of(tmp_path, (val, val)), events_of_a_run(val, (0.9, 0.2))
    ).words_shown
    assert "after step 10, epoch 1 (best so far)" in words


def test_names_and_paths_are_shown_as_they_are(tmp_path: Path) -> None:
    """Also a file name that is not valid text."""
    samples = pictures_of(tmp_path / "val", (HOSTILE, "b"))
    folder = tmp_path / "<i>out & in"
    finding = Finding("<b>kind", "error", "removed", HOSTILE, HOSTILE, "\udcff<u>.png")
    facts = facts_of(folder, (replace(samples, source=HOSTILE),) * 2, [finding])
    page = page_of_run(folder, facts, events_of_a_run(samples, (0.7,)))
    page.check(RESULTS | ALWAYS | {"curves"})
    assert not page.tags & {"b>kind", "u", "script"}
    for text in ("<i>out & in", "<b>kind", "\\udcff<u>.png", "<script>alert(1)</script> &"):
        assert text in page.words_shown


def test_a_page_that_fails_is_one_line_of_the_log(
    val: SampleTable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cpu()  # the logger speaks once there is an accelerator
    (tmp_path / "metrics.csv").write_text("step,map50\nten,0.5\n")
    (tmp_path / "report.html").write_text("the page before")
    page = ReportPage(facts_of(tmp_path, (val, val)))
    with caplog.at_level(logging.WARNING):
        page(Progress("start", 0, 0, 0, 10))
        page(Progress("end", 1, 0, 10, 10))
        page.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "report.html could not be written: ValueError" in caplog.records[0].message
    assert (tmp_path / "report.html").read_text() == "the page before"


def test_pages_on_the_way_take_little_of_the_time(val: SampleTable, tmp_path: Path) -> None:
    """Each look at the clock takes half a second here, and so a page some seconds."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.5
        return now

    page = ReportPage(facts_of(tmp_path, (val, val)), clock)
    start, *_, evaluation = events_of_a_run(val, (0.5,))
    written = []
    page(start)
    for now in (FIRST_AFTER / 2, FIRST_AFTER + 1, FIRST_AFTER + 20, 900, 920):  # noqa: B007
        (tmp_path / "report.html").unlink(missing_ok=True)
        page(evaluation)
        written.append((tmp_path / "report.html").exists())
    assert written == [False, True, False, True, False]


def test_the_page_of_an_evaluation(val: SampleTable, tmp_path: Path) -> None:
    config, _ = parse(["--eval", "--load_from", HOSTILE, "--output_dir", str(tmp_path)])
    evaluation = evaluation_of(val, found_in(val, 0.8))
    write_evaluation_page(config, ViDTConfig(num_classes=3), val, [], evaluation, cpu(), 12.0)
    page = Page(tmp_path / "report.html")
    page.check(RESULTS | ALWAYS)
    assert "evaluation of <script>alert(1)</script>" in page.words_shown
    assert f"AP50 {evaluation.metrics['map50']:.3f} validation" in page.words_shown


@pytest.mark.slow
def test_the_command_line_leaves_a_page(learnt: Learnt, room: Path) -> None:
    assert main_here(argv(learnt.data, room, f"--load_from {learnt.weights}")) == 0
    page = Page(room / "report.html")
    page.check(RESULTS | ALWAYS | {"curves"})
    assert "finished at step 2 of 2" in page.words_shown and "swin_test" in page.words_shown
    before = page.text
    for folder, name in ((room / "other", "report.html"), (room, "evaluation.html")):
        assert main_here(argv(learnt.data, folder, f"--eval --load_from {learnt.weights}")) == 0
        page = Page(folder / name)
        page.check(RESULTS | ALWAYS)
        assert "--with_box_refine" in page.words_shown
    assert (room / "report.html").read_text(encoding="utf-8") == before


def test_findings_that_stand_for_many_count_as_many() -> None:
    one = Finding("bad box", "warning", "dropped", "empty", "train")
    (group,) = finding_groups([*[one] * MOST_FINDINGS, replace(one, count=7000)])
    assert (group["count"], group["more"]) == (MOST_FINDINGS + 7000, 7000)
    assert len(group["lines"]) == MOST_FINDINGS
