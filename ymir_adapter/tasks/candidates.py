"""One rank of a mining or inference task: `accelerate launch -m ymir_adapter.tasks.candidates`.

Every rank looks at its share of the candidates once, whatever was asked for: the predictions that
become the result of inference are those that the images are ranked by. What it finds goes to files
of its own as it is found (`parts`); the main process puts them together in the order of the index.

Progress: mining alone and inference alone fill 0 to 1. Together, mining would fill the first half
and inference the second; in a pass that serves both each image takes both halves a step further, so
the share of images that are done is the progress.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from trainer.loop.agreement import Agreement
from trainer.loop.launch_check import require_processes
from trainer.train import make_accelerator
from vidt.images.files import UnreadableImage, probe_images
from vidt.predict.predictor import Detections, Predictor
from ymir_adapter.dataset.tables import candidates, locate
from ymir_adapter.launch import run_rank
from ymir_adapter.protocol.errors import Code, TaskError
from ymir_adapter.protocol.outputs import DetectionWriter, Monitor, write_ranking
from ymir_adapter.protocol.task import CandidateSettings, Task, candidate_settings, pick_weights
from ymir_adapter.tasks.inference import (
    Detector,
    Picture,
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
    weighted,
)
from ymir_adapter.tasks.parts import NAMED_UNREADABLE, Part, Parts

logger = logging.getLogger(__name__)

LOADED, LOOKED = 0.02, 0.97  # progress once the weights are loaded, once all images are done
PROBED_TOGETHER = 4096  # files whose headers are read at a time
PARTS = ".candidates"  # folder of what the ranks found, below the output's root until it is merged


class Search:
    """What a rank does with its share of the candidates: looks at each once, notes all that was
    asked for.
    """

    def __init__(
        self,
        task: Task,
        settings: CandidateSettings,
        assets: Sequence[str],
        detector: Detector | None,
    ) -> None:
        """No detector: images are only looked at from outside, for a random ranking."""
        self.task, self.settings, self.assets = task, settings, assets
        self.detector = detector
        self.algorithm = algorithm_of(task, settings)
        self.rows = rows_per_image(self.algorithm)
        # A random ranking stays random: it asks for no predictions that would tell classes.
        self.balanced = settings.class_balance and self.algorithm not in (None, "random")
        self.names: list[str] = []  # by label, as the task spells them
        if detector is not None:
            self.names = names_in_task(detector.predictor.class_names, task.class_names)

    def run(
        self,
        indices: Sequence[int],
        part: Part,
        tick: Callable[[float], None] = lambda done: None,
    ) -> None:
        """Notes the candidates at `indices` in `part`; tick gets the share that is done, 0..1."""
        done = 0
        for count in self._looked_at(indices, part):
            done += count
            tick(done / len(indices))

    def _looked_at(self, indices: Sequence[int], part: Part) -> Iterator[int]:
        """How many candidates were noted, each time some were."""
        if self.detector is None:
            for picture in probed(indices, self._path):
                self._note([picture], None, part)
                yield 1
            return
        preprocessing = self.detector.predictor.preprocessing
        workers = self.settings.num_workers_per_gpu
        pictures = read_pictures(indices, self._path, preprocessing, workers)
        batch_size = max(self.settings.batch_size_per_gpu // self.rows, 1)
        for batch in equal_canvases(pictures, batch_size):
            readable = batch[0].pixels is not None
            predictions = self._predicted(self.detector, batch) if readable else None
            self._note(batch, predictions, part)
            yield len(batch)

    def _path(self, index: int) -> str:
        return locate(self.task, self.assets[index])

    def _predicted(self, detector: Detector, batch: Sequence[Picture]) -> Predictions:
        """Of each picture and then, with CALD, of its views: 1 or 1 + V rows for a picture."""
        images = detector.normalised(batch)
        if self.algorithm == "cald":
            pairs = zip(batch, images, strict=True)
            images = torch.cat([self._with_views(picture, image) for picture, image in pairs])
        return detector(images)

    def _with_views(self, picture: Picture, image: Tensor) -> Tensor:
        moved = views(image, self.settings.seed, self.assets[picture.index])
        return torch.cat([image[None], moved])

    def _note(self, batch: Sequence[Picture], predictions: Predictions | None, part: Part) -> None:
        found: list[Detections | None] = [None] * len(batch)
        if self.task.run_infer and self.detector is not None and predictions is not None:
            pictures_only = predictions.rows(slice(None, None, self.rows))
            threshold = self.settings.conf_threshold
            found = [*detections_of(self.detector, batch, pictures_only, threshold)]
        for position, (picture, detections) in enumerate(zip(batch, found, strict=True)):
            rows = slice(position * self.rows, (position + 1) * self.rows)
            own = None if predictions is None else predictions.rows(rows)
            part.add(picture, self._score(picture, own), detections, self._shares(own))

    def _score(self, picture: Picture, predictions: Predictions | None) -> float:
        """Of one picture; predictions hold it alone or with its views behind it."""
        if self.algorithm is None or picture.problem:
            return 0.0  # where it matters, `final_scores` gives the lowest
        if self.algorithm == "random":
            return random_score(self.settings.seed, self.assets[picture.index])
        assert predictions is not None and picture.pixels is not None
        height, width = picture.pixels.shape[1:]
        return informativeness(
            self.algorithm, predictions, (height, width), self.settings.conf_threshold
        )

    def _shares(self, predictions: Predictions | None) -> Tensor | None:
        if not self.balanced:
            return None
        if predictions is None:
            return torch.zeros(len(self.names), dtype=torch.int64)
        return class_shares(predictions.probabilities[-1, 0], self.settings.conf_threshold)

    def write_results(self, parts: Parts) -> None:
        """From what all ranks found. Mining first: what is there when inference fails is a result
        already.
        """
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


def probed(indices: Sequence[int], path_of: Callable[[int], str]) -> Iterator[Picture]:
    """Candidates without their pixels: only whether they are images."""
    for start in range(0, len(indices), PROBED_TOGETHER):
        some = indices[start : start + PROBED_TOGETHER]
        headers = probe_images(path_of(index) for index in some)
        for index, header in zip(some, headers, strict=True):
            if isinstance(header, UnreadableImage):
                yield Picture(index, problem=str(header))
            else:
                yield Picture(index, header.size)


def algorithm_of(task: Task, settings: CandidateSettings) -> str | None:
    """None where nothing is mined."""
    return settings.mining_algorithm if task.run_mining else None


def rows_per_image(algorithm: str | None) -> int:
    """How many rows of a batch an image takes: itself and its views."""
    return 1 + VIEWS if algorithm == "cald" else 1


def informativeness(
    algorithm: str, predictions: Predictions, canvas: tuple[int, int], threshold: float
) -> float:
    """Of one picture: predictions hold it alone, or for CALD with its views behind it."""
    probabilities, boxes = predictions.probabilities, predictions.boxes.double()
    if algorithm == "entropy":
        return entropy_score(probabilities[-1, 0], boxes[0], threshold).item()
    if algorithm == "aldd":
        return aldd_score(probabilities[:, 0], boxes[0], threshold).item()
    return cald_score(probabilities[-1], boxes, canvas, threshold).item()


def final_scores(parts: Parts, algorithm: str, num_classes: int | None) -> list[float]:
    """As they are ranked and written. num_classes: of the class shares, None for no balance."""
    floor, scores = FLOORS[algorithm], torch.from_numpy(parts.images["score"].copy())
    if num_classes is not None:
        scores = weighted(scores, torch.from_numpy(parts.class_weights(num_classes)), floor)
    lowest = floor - 1  # no image that can be read scores so
    return [
        rounded(score) if readable else lowest
        for score, readable in zip(scores.tolist(), parts.readable.tolist(), strict=True)
    ]


def search_candidates(task: Task, monitor: Monitor | None, accelerator: Accelerator) -> None:
    """A mining and inference task, whole. monitor: on the main process. Raises TaskError."""
    settings, agreement = candidate_settings(task), Agreement(accelerator)
    assets = candidates(task)
    search = Search(task, settings, assets, load(task, settings, accelerator))
    update = (lambda share: None) if monitor is None else monitor.update
    update(LOADED)
    folder = task.output.root_dir / PARTS
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    agreement.gather(0)  # the folder is there
    try:
        mine = range(accelerator.process_index, len(assets), accelerator.num_processes)
        with Part(folder, accelerator.process_index) as part:
            search.run(mine, part, lambda done: update(LOADED + (LOOKED - LOADED) * done))
        told = agreement.gather_objects((part.num_unreadable, part.unreadable))
        report_unreadable(told, len(assets), accelerator.is_main_process)
        if accelerator.is_main_process:
            with Parts(folder, len(assets), accelerator.num_processes) as parts:
                search.write_results(parts)
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
    update(1.0)
    agreement.gather(0)  # nobody leaves while another may still fail


def load(task: Task, settings: CandidateSettings, accelerator: Accelerator) -> Detector | None:
    """The detector that the task was given; None where it is not asked. Raises TaskError."""
    path = pick_weights(task)  # a task with wrong weights fails whether they are needed or not
    assert path is not None, "only training may do without weights"
    if accelerator.is_main_process:
        logger.info(f"weights: {path}")
    algorithm = algorithm_of(task, settings)
    if algorithm == "random" and not task.run_infer:
        return None
    predictor = Predictor.from_checkpoint(path, device=accelerator.device)
    return make_detector(algorithm, settings, predictor)


def make_detector(
    algorithm: str | None, settings: CandidateSettings, predictor: Predictor
) -> Detector:
    """An image and its views share a batch, whatever the batch size."""
    rows = max(settings.batch_size_per_gpu, rows_per_image(algorithm))
    return Detector(predictor, rows=rows, num_members=COMMITTEE if algorithm == "aldd" else 1)


def report_unreadable(
    told: Iterable[tuple[int, list[str]]], num_candidates: int, is_main: bool
) -> None:
    """Raises TaskError, on every process alike, if no candidate could be read."""
    told = list(told)
    count, reasons = sum(number for number, _ in told), [line for _, some in told for line in some]
    if count == num_candidates:
        raise TaskError(
            Code.IMAGE_FORMAT, f"none of {count} candidates can be read; the first: {reasons[0]}"
        )
    if count and is_main:
        named = "\n".join(reasons[:NAMED_UNREADABLE])
        logger.warning(f"{count} of {num_candidates} candidates cannot be read, such as\n{named}")


def work(task: Task, monitor: Monitor | None) -> None:
    """What a rank does."""
    accelerator = make_accelerator()
    require_processes(accelerator.num_processes)
    if accelerator.device.type == "cuda":
        # Fewer digits in convolutions than elsewhere would make scores depend on the batch.
        torch.backends.cudnn.allow_tf32 = False
    search_candidates(task, monitor, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    run_rank(work)
