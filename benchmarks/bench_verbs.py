"""`mimscale bench checkpoint` and `simulate`, with their results where those of the other benchmarks lie.

python benchmarks/bench_verbs.py --hardware NAME checkpoint RECIPE [words of the verb ...]
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimscale.bench import checkpoint, measure, simulate

# kind -> its table and chart, and the exit codes with which it has a result (1: a target was missed)
KINDS: dict[str, tuple[Callable[[dict[str, Any]], str], Callable[[dict[str, Any], Path], None], tuple[int, ...]]] = {
    "checkpoint": (checkpoint.as_text, checkpoint.draw, (0, 1)),
    "simulate": (simulate.as_markdown, simulate.draw, (0,)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a benchmark of mimscale and keep its result.")
    parser.add_argument("--hardware", default="unnamed", help="short name of the machine, for the result's file name")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, help="folder of the result")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("words", nargs=argparse.REMAINDER, help="of the verb")
    arguments = parser.parse_args()
    words = arguments.words
    as_text, draw, codes = KINDS[arguments.kind]
    command = [sys.executable, "-m", "mimscale.cli", "bench", arguments.kind, *words, "--json"]
    print(*command[2:], file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in codes:
        return done.returncode
    tree = json.loads(done.stdout.splitlines()[-1])
    own = {key: value for key, value in tree.items() if key not in ("schema_version", "benchmark")}
    where = tree["surroundings"]
    head = (
        f"# bench {' '.join([arguments.kind, *words])}: {where['cpu']}, {where['time'][:10]}, commit {where['commit']}"
    )
    path = measure.write_result(arguments.out, arguments.kind, arguments.hardware, own, f"{head}\n\n{as_text(tree)}")
    draw(tree, path.with_suffix(".png"))
    print(path.read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
