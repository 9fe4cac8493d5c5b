"""`mimscale predict RUN_DIR [RUN_DIR ...] INPUT [INPUT ...] [key=value ...]`: masks of files, without a store.

Several run directories are folds of one experiment: the mean of their probabilities decides. An input is a volume
file, files of its channels joined by commas, a folder of volumes or of one DICOM series, a DICOMDIR, a pattern, or a
list that `mimscale ingest` reads. What is written: see `mimscale.predict.write`.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mimscale.config import config_yaml, load_config, split_arguments, verb_parser
from mimscale.console import print_json, say, track
from mimscale.errors import CheckpointError, ConfigError, DataError
from mimscale.predict.config import PredictConfig

if TYPE_CHECKING:
    from mimscale.predict.dicom_seg import Segment
    from mimscale.predict.ensemble import Ensemble
    from mimscale.predict.inputs import Input

USAGE = "expected RUN_DIR [RUN_DIR ...] INPUT [INPUT ...]"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of an input."""

    input: str  # as typed
    name: str
    written: list[str]
    seconds: float
    problem: str | None = None  # why there is nothing, or not all


def main(argv: list[str]) -> int:
    """The verb `predict`."""
    parser = verb_parser(
        "predict", "Segment files: NIfTI or DICOM-SEG on their own grids, from a run or several folds."
    )
    parser.add_argument("--json", action="store_true", help="what became of each input, as JSON")
    parser.add_argument("--check", action="store_true", help="print the resolved config and stop")
    arguments = parser.parse_intermixed_args(argv)  # words may follow a flag
    words, overrides = split_arguments(arguments.words)
    config = load_config(PredictConfig, None, overrides)
    if arguments.check:
        sys.stdout.write(config_yaml(config))
        return 0
    run_dirs, inputs = runs_and_inputs(words)
    results = predict(run_dirs, inputs, config)
    failed = [one for one in results if one.problem is not None]
    if arguments.json:
        print_json({"results": [asdict(one) for one in results], "failed": len(failed)})
    else:
        for one in results:
            print(*one.written, sep="\n", end="\n" if one.written else "")
    say(f"{len(results) - len(failed)} of {len(results)} inputs done")
    for one in failed:
        say(f"  {one.problem}")
    return DataError.exit_code if failed else 0


def runs_and_inputs(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The first word, and those right behind it that are run directories too; and all others.

    Raises:
        ConfigError: there is no run or no input.
    """
    count = 1
    while count < len(words) and (Path(words[count]) / "config.yaml").is_file():
        count += 1
    if len(words) <= count:
        raise ConfigError(f"{USAGE}, got {' '.join(words) or 'nothing'}")
    return [Path(word) for word in words[:count]], list(words[count:])


def predict(run_dirs: Sequence[Path], words: Sequence[str], config: PredictConfig) -> list[Result]:
    """Segment all that the words stand for, and write it below `config.out`. A bad input stops none of the others.

    Raises:
        ConfigError: no run directory, one without a segmentation model, or runs that do not agree.
        CheckpointError: no usable checkpoint.
    """
    from mimscale.evaluate.weights import choose_device, cpu_threads
    from mimscale.predict.ensemble import load_ensemble
    from mimscale.predict.inputs import find_inputs

    device = choose_device(config.device)
    ensemble = load_ensemble(run_dirs, config, device)
    segments = _segments(ensemble, config)
    inputs = find_inputs(words, ensemble.ingest, config.series)
    if config.format != "nifti" and any(one.is_dicom for one in inputs):
        from mimscale.predict.dicom_seg import require_highdicom

        require_highdicom()
    folds = f" ({len(run_dirs)} folds)" if len(run_dirs) > 1 else ""
    say(f"{len(inputs)} input(s) by {ensemble.name}{folds} on {device}")
    results = []
    with cpu_threads(config.threads):
        for one in inputs:
            started_s = time.perf_counter()
            written: list[str] = []
            problem = None
            try:
                _predict_one(one, ensemble, segments, config, written)
            except (DataError, CheckpointError) as error:
                problem = str(error)
                say(f"{one.typed}: nothing for it" if not written else f"{one.typed}: not all of it")
            seconds = round(time.perf_counter() - started_s, 2)
            results.append(Result(input=one.typed, name=one.name, written=written, seconds=seconds, problem=problem))
    return results


def _segments(ensemble: "Ensemble", config: PredictConfig) -> "list[Segment]":
    from mimscale.evaluate.outputs import Classes
    from mimscale.predict.dicom_seg import segments_of

    names = ensemble.outputs.names
    return segments_of(names[1:] if isinstance(ensemble.outputs, Classes) else names, config.codes)


def _predict_one(
    one: "Input", ensemble: "Ensemble", segments: "list[Segment]", config: PredictConfig, written: list[str]
) -> None:
    """Segment one input; the paths of what is written go into `written` one by one.

    Raises:
        DataError, CheckpointError: naming the input.
    """
    from mimscale.ingest.formats import QuarantineError
    from mimscale.predict import write
    from mimscale.predict.volume import explained, predict_volume

    if one.source is None or one.problem is not None:
        raise DataError(_named(one, str(one.problem)))
    if one.source.problem is not None:
        raise DataError(_named(one, explained(*one.source.problem, ensemble.ingest.channels)))
    places = write.still_to_write(write.destinations(one, ensemble.outputs, config), config)
    if not places:
        say(f"{one.name}: is there already")
        return
    masks = predict_volume(_where(one), one.source, ensemble, config, partial(_progress, one.name))
    for place in places:
        if place.kind == "nifti":
            write.write_masks(place.path, masks, ensemble.outputs)
        else:
            from mimscale.predict.dicom_seg import write_dicom_seg

            try:
                write_dicom_seg(place.path, masks.voxels, one.source.channels[0], segments, ensemble.name)
            except QuarantineError as error:
                raise DataError(_named(one, explained(error.reason, error.detail, 1))) from None
            except DataError as error:
                raise DataError(_named(one, str(error))) from None
        written.append(str(place.path))
        say(f"wrote {place.path}")


def _progress(name: str, passes: int) -> Callable[[], object]:
    ticks = track(range(passes), f"{name}, batches of windows", passes)
    left = iter(range(passes - 1))

    def tick() -> None:
        next(ticks, None)
        if next(left, None) is None:
            next(ticks, None)  # lets the progress bar end

    return tick


def _where(one: "Input") -> str:
    """The file of an input, or the folder of its series."""
    if one.source is None:
        return one.typed
    files = one.source.channels[0]
    if len(one.source.channels) > 1:
        return one.typed
    return files[0] if len(files) == 1 else str(Path(files[0]).parent)


def _named(one: "Input", problem: str) -> str:
    where = _where(one)
    return problem if where in problem or one.typed in problem else f"{where}: {problem}"
