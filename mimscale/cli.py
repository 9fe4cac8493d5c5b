"""`mimscale VERB ...`: a table of verbs, each imported only when it is called (`mimscale --help` loads no torch)."""

import importlib
import os
import sys
import traceback
from typing import NoReturn

from mimscale.errors import MimscaleError

# verb -> (module:function, one line). Names are strings so that nothing heavy is imported here.
VERBS: dict[str, tuple[str, str]] = {
    "recipes": ("mimscale.config:recipes_main", "list the packaged recipes, or print one"),
    "cohort": ("mimscale.ingest.cohort:main", "write a small cohort of deformed subjects of one real labelled volume"),
    "ingest": ("mimscale.ingest.run:main", "volumes -> store"),
    "inspect": ("mimscale.report.inspect:main", "what a store or a run holds; --verify checks every byte"),
    "export": (
        "mimscale.evaluate.export:main",
        "a volume as NIfTI, a pack unzipped, or a run's weights as safetensors",
    ),
    "pretrain": ("mimscale.train.verbs:pretrain_main", "train a masked autoencoder on a store"),
    "finetune": ("mimscale.train.verbs:finetune_main", "train a UNETR, from a pretrained encoder or from scratch"),
    "evaluate": ("mimscale.evaluate.run:main", "score a run on whole validation volumes"),
    "predict": ("mimscale.predict.run:main", "segment files: NIfTI or DICOM-SEG on their own grids, without a store"),
    "extract": ("mimscale.features.run:main", "features of all volumes of a store by the frozen encoder of a run"),
    "probe": ("mimscale.features.probe:main", "k-NN and linear probes on features, from a table of targets"),
    "bench": ("mimscale.bench.verbs:main", "how fast reading, a step, training and saving are, and what limits them"),
    "report": ("mimscale.report.run:main", "one HTML page of one or more runs"),
    "plan": ("mimscale.bench.plan:main", "what a run needs and how fast it goes, before any job"),
    "study": ("launch.study:main", "an experiment of many runs, here or on Slurm, and its tables and curves"),
    "submit": ("launch.submit:main", "run a verb as a job, on this machine or on a Slurm cluster"),
    "status": ("launch.status:main", "what submitted runs are doing"),
    "logs": ("launch.steer:logs_main", "what a submitted run prints"),
    "cancel": ("launch.steer:cancel_main", "let a submitted run save and stop, for good"),
    "resume": ("launch.steer:resume_main", "submit a run again where it stopped"),
}


def usage() -> str:
    """The text of `mimscale --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {line}" for verb, (_, line) in VERBS.items()]
    return "usage: mimscale VERB [--help] ...\n\nverbs:\n" + "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run one verb; the return value is the exit code of design and README."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    verb, *rest = arguments
    if verb == "--version":
        from importlib.metadata import version

        print(version("mimscale"))
        return 0
    if verb not in VERBS:
        sys.stderr.write(f"mimscale: no verb {verb!r}; there are: {', '.join(VERBS)}\n")
        return 2
    module, function = VERBS[verb][0].split(":")
    try:
        code = getattr(importlib.import_module(module), function)(rest)
        assert isinstance(code, int), f"{module}:{function} returned {code!r} instead of an exit code"
        return code
    except MimscaleError as error:
        sys.stderr.write(f"mimscale {verb}: {error}\n")
        if os.environ.get("MIMSCALE_TRACEBACK"):
            traceback.print_exc()
        return error.exit_code


def run() -> NoReturn:
    """What the console script calls: `main`, and then the end of this process."""
    code = main()
    if "mimscale.train.engine" in sys.modules:  # this process may have been a rank
        from mimscale.world import leave_at_once

        leave_at_once(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
