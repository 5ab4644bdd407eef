"""One rank of a mining or inference task: `accelerate launch -m ymir_adapter.tasks.candidates`.

Every rank predicts each candidate of its share once: mining ranks by the predictions that become
the result of inference. A rank writes its results to files of its own (`parts`); the main process
merges them in the order of the index.

Progress is the share of images that are done, also when one pass serves mining and inference.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from trainer.loop.agreement import Agreement
from trainer.loop.launch import require_processes
from trainer.train import make_accelerator
from vidt.errors import shown
from vidt.images.files import UnreadableImage, probe_images
from vidt.predict.detections import Detections
from vidt.predict.predictor import Predictor
from ymir_adapter.dataset.tables import candidates, locate
from ymir_adapter.launch import run_rank
from ymir_adapter.protocol.errors import Code, TaskError
from ymir_adapter.protocol.monitor import Monitor
from ymir_adapter.protocol.outputs import DetectionWriter, write_ranking
from ymir_adapter.protocol.task import CandidateSettings, Task, candidate_settings, pick_weights
from ymir_adapter.tasks.inference import (
    Candidate,
    Detector,
    Predictions,
    detections_of,
    equal_canvases,
    names_in_task,
    read_pictures,
)
from ymir_adapter.tasks.mining import (
    COMMITTEE,
    FLOORS,
    VIEWS,
    aldd_score,
    cald_score,
    class_shares,
    entropy_score,
    random_score,
    ranking,
    rounded,
    views,
    wanted_share,
    weighted,
)
from ymir_adapter.tasks.parts import NAMED_UNREADABLE, Part, Parts

logger = logging.getLogger(__name__)

LOADED, PREDICTED = 0.02, 0.97  # progress after loading the weights, and after the last image
PROBED_TOGETHER = 4096  # files whose headers are read at once
PARTS = ".candidates"  # folder of the ranks' files, below the output's root until they are merged


class CandidatePass:
    """Predicts candidates and records the data that mining and inference need."""

    def __init__(
        self,
        task: Task,
        settings: CandidateSettings,
        assets: Sequence[str],
        detector: Detector | None,
    ) -> None:
        """Without a detector (a random ranking) only the headers of the images are read."""
        self.task, self.settings, self.assets = task, settings, assets
        self.detector = detector
        self.algorithm = algorithm_of(task, settings)
        self.rows = rows_per_image(self.algorithm)
        # A random ranking makes no predictions, so it knows no classes.
        self.balanced = settings.class_balance and self.algorithm not in (None, "random")
        self.names: list[str] = []  # by label, as the task spells them
        self.class_weights: Tensor | None = None  # [K], at most 1
        if detector is not None:
            self.names = names_in_task(detector.predictor.class_names, task.class_names)
        if settings.class_distribution is not None:
            given = dict(zip(task.class_names, settings.class_distribution, strict=True))
            wanted = torch.tensor([given.get(name, 0.0) for name in self.names]).double()
            self.class_weights = wanted / max(given.values())

    def run(
        self,
        indices: Sequence[int],
        part: Part,
        tick: Callable[[float], None] = lambda done: None,
    ) -> None:
        """Records the candidates at `indices` in `part`; tick receives the share that is done."""
        done = 0
        for count in self._processed(indices, part):
            done += count
            tick(done / len(indices))

    def _processed(self, indices: Sequence[int], part: Part) -> Iterator[int]:
        """Records all candidates; yields the number of each batch."""
        if self.detector is None:
            for picture in probed(indices, self._path):
                self._record([picture], None, part)
                yield 1
            return
        preprocessing = self.detector.predictor.preprocessing
        workers = self.settings.num_workers_per_gpu
        pictures = read_pictures(indices, self._path, preprocessing, workers)
        batch_size = max(self.detector.rows // self.rows, 1)
        for batch in equal_canvases(pictures, batch_size):
            readable = batch[0].pixels is not None
            predictions = self._predicted(self.detector, batch) if readable else None
            self._record(batch, predictions, part)
            yield len(batch)

    def _path(self, index: int) -> str:
        return locate(self.task, self.assets[index])

    def _predicted(self, detector: Detector, batch: Sequence[Candidate]) -> Predictions:
        """A row of predictions for each picture; with CALD 1 + V rows, for it and its views."""
        images = detector.normalised(batch)
        if self.algorithm == "cald":
            pairs = zip(batch, images, strict=True)
            images = torch.cat([self._with_views(picture, image) for picture, image in pairs])
        return detector(images)

    def _with_views(self, picture: Candidate, image: Tensor) -> Tensor:
        moved = views(image, self.settings.seed, self.assets[picture.index])
        return torch.cat([image[None], moved])

    def _record(
        self, batch: Sequence[Candidate], predictions: Predictions | None, part: Part
    ) -> None:
        found: list[Detections | None] = [None] * len(batch)
        if self.task.run_infer and self.detector is not None and predictions is not None:
            pictures_only = predictions.rows(slice(None, None, self.rows))
            threshold = self.settings.conf_threshold
            found = [*detections_of(self.detector, batch, pictures_only, threshold)]
        for position, (picture, detections) in enumerate(zip(batch, found, strict=True)):
            rows = slice(position * self.rows, (position + 1) * self.rows)
            own = None if predictions is None else predictions.rows(rows)
            part.add(picture, self._score(picture, own), detections, self._shares(own))

    def _score(self, picture: Candidate, predictions: Predictions | None) -> float:
        """The score of one picture, whose predictions may include those of its views."""
        if self.algorithm is None or picture.problem:
            return 0.0  # `final_scores` gives unreadable candidates the lowest score
        if self.algorithm == "random":
            return random_score(self.settings.seed, self.assets[picture.index])
        assert predictions is not None and picture.pixels is not None
        height, width = picture.pixels.shape[1:]
        threshold = self.settings.conf_threshold
        score = informativeness(self.algorithm, predictions, (height, width), threshold)
        if self.class_weights is None:
            return score
        final, boxes = predictions.probabilities[-1, 0], predictions.boxes[0].double()
        share = wanted_share(final, boxes, threshold, self.class_weights)
        return weighted(torch.tensor(score).double(), share, FLOORS[self.algorithm]).item()

    def _shares(self, predictions: Predictions | None) -> Tensor | None:
        if not self.balanced:
            return None
        if predictions is None:
            return torch.zeros(len(self.names), dtype=torch.int64)
        return class_shares(predictions.probabilities[-1, 0], self.settings.conf_threshold)

    def write_results(self, parts: Parts) -> None:
        """Writes the results of all ranks, mining first: its ranking stays if inference fails."""
        if self.algorithm is not None:
            num_classes = len(self.names) if self.balanced else None
            scores = final_scores(parts, self.algorithm, num_classes)
            ranked = ((self.assets[index], scores[index]) for index in ranking(scores))
            write_ranking(self.task.output.mining_result_file, ranked)
        if self.task.run_infer:
            with DetectionWriter(self.task) as writer:
                for index, asset in enumerate(self.assets):
                    height, width = parts.images[index][["height", "width"]].tolist()
                    size = (height, width) if height else None
                    writer.add(asset, size, self.names, parts.detections(index))


def probed(indices: Sequence[int], path_of: Callable[[int], str]) -> Iterator[Candidate]:
    """Candidates with their sizes but without pixels."""
    for start in range(0, len(indices), PROBED_TOGETHER):
        some = indices[start : start + PROBED_TOGETHER]
        headers = probe_images(path_of(index) for index in some)
        for index, header in zip(some, headers, strict=True):
            if isinstance(header, UnreadableImage):
                yield Candidate(index, problem=str(header))
            else:
                yield Candidate(index, header.size)


def algorithm_of(task: Task, settings: CandidateSettings) -> str | None:
    """None for a task without mining."""
    return settings.mining_algorithm if task.run_mining else None


def rows_per_image(algorithm: str | None) -> int:
    """Rows of a batch for each image: itself and its views."""
    return 1 + VIEWS if algorithm == "cald" else 1


def informativeness(
    algorithm: str, predictions: Predictions, canvas: tuple[int, int], threshold: float
) -> float:
    """The score of one picture; for CALD the predictions include those of its views."""
    probabilities, boxes = predictions.probabilities, predictions.boxes.double()
    if algorithm == "entropy":
        return entropy_score(probabilities[-1, 0], boxes[0], threshold).item()
    if algorithm == "aldd":
        return aldd_score(probabilities[:, 0], boxes[0], threshold).item()
    return cald_score(probabilities[-1], boxes, canvas, threshold).item()


def final_scores(parts: Parts, algorithm: str, num_classes: int | None) -> list[float]:
    """The scores to rank by and to write. num_classes: for class balance, else None."""
    floor, scores = FLOORS[algorithm], torch.from_numpy(parts.images["score"].copy())
    if num_classes is not None:
        scores = weighted(scores, torch.from_numpy(parts.class_weights(num_classes)), floor)
    lowest = floor - 1  # below every readable image
    return [
        rounded(score) if readable else lowest
        for score, readable in zip(scores.tolist(), parts.readable.tolist(), strict=True)
    ]


def process_candidates(task: Task, monitor: Monitor | None, accelerator: Accelerator) -> None:
    """Runs a mining and inference task. monitor: on the main process only. Raises TaskError."""
    settings, agreement = candidate_settings(task), Agreement(accelerator)
    assets = candidates(task)
    candidate_pass = CandidatePass(task, settings, assets, load(task, settings, accelerator))
    update = (lambda share: None) if monitor is None else monitor.update
    if accelerator.is_main_process and candidate_pass.detector is not None:
        warn_of_unknown_classes(candidate_pass.detector.predictor.class_names, candidate_pass.names)
    update(LOADED)
    folder = task.output.root_dir / PARTS
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    agreement.gather(0)  # the folder exists
    try:
        mine = range(accelerator.process_index, len(assets), accelerator.num_processes)
        with Part(folder, accelerator.process_index) as part:
            candidate_pass.run(
                mine, part, lambda done: update(LOADED + (PREDICTED - LOADED) * done)
            )
        unreadable = agreement.gather_objects((part.num_unreadable, part.unreadable))
        report_unreadable(unreadable, len(assets), accelerator.is_main_process)
        if accelerator.is_main_process:
            with Parts(folder, len(assets), accelerator.num_processes) as parts:
                candidate_pass.write_results(parts)
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
    update(1.0)
    agreement.gather(0)  # no rank leaves while another may fail


def warn_of_unknown_classes(known: Sequence[str], names: Sequence[str]) -> None:
    """Warns of classes of the weights that are not the task's: their objects are left out. `names`
    are those of `names_in_task`.
    """
    lost = [name for name, own in zip(known, names, strict=True) if not own]
    if len(lost) == len(known):
        frame = "!" * 80
        logger.warning(
            f"{frame}\nWARNING: nothing will be found: the weights have no class of the task's "
            f"class_names.\nTheir classes: {shown(', '.join(known), 300)}\nChoose class_names from "
            f"them.\n{frame}"
        )
    elif lost:
        logger.warning(
            "objects of these classes of the weights are left out, since class_names does not have "
            f"them: {shown(', '.join(lost), 300)}"
        )


def load(task: Task, settings: CandidateSettings, accelerator: Accelerator) -> Detector | None:
    """The task's detector; None if the task makes no predictions. Raises TaskError."""
    path = pick_weights(task)  # wrong weights are an error even where they are not needed
    assert path is not None, "only training can start without weights"
    if accelerator.is_main_process:
        logger.info(f"weights: {path}")
    algorithm = algorithm_of(task, settings)
    if algorithm == "random" and not task.run_infer:
        return None
    precision, device = settings.mixed_precision, accelerator.device
    if precision == "fp16" and device.type == "cpu":
        raise TaskError(
            Code.CONFIG, "mixed_precision is fp16; a task on a CPU takes auto, no or bf16"
        )
    predictor = Predictor.from_checkpoint(path, device=device, precision=precision)
    if accelerator.is_main_process:
        logger.info(f"on {device}, precision {predictor.precision} ({predictor.why_precision})")
    if settings.img_size is not None:
        predictor.preprocessing = replace(predictor.preprocessing, eval_size=settings.img_size)
    return make_detector(algorithm, settings, predictor)


def make_detector(
    algorithm: str | None, settings: CandidateSettings, predictor: Predictor
) -> Detector:
    """A detector whose batches hold at least an image with its views. On a CPU images are computed
    one by one: batches of large images are no faster there, and no score depends on its batch.
    """
    rows = max(settings.batch_size_per_gpu, rows_per_image(algorithm))
    if predictor.device.type == "cpu":
        rows = 1
    return Detector(predictor, rows=rows, num_members=COMMITTEE if algorithm == "aldd" else 1)


def report_unreadable(
    unreadable: Iterable[tuple[int, list[str]]], num_candidates: int, is_main: bool
) -> None:
    """Raises TaskError, on every process alike, if no candidate could be read."""
    counts, lists = zip(*unreadable, strict=True)
    count, reasons = sum(counts), [line for some in lists for line in some]
    if count == num_candidates:
        raise TaskError(
            Code.IMAGE_FORMAT, f"none of {count} candidates can be read; the first: {reasons[0]}"
        )
    if count and is_main:
        named = "\n".join(reasons[:NAMED_UNREADABLE])
        logger.warning(f"{count} of {num_candidates} candidates cannot be read, such as\n{named}")


def work(task: Task, monitor: Monitor | None) -> None:
    """The work of a rank."""
    accelerator = make_accelerator()
    require_processes(accelerator.num_processes)
    process_candidates(task, monitor, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    run_rank(work)
