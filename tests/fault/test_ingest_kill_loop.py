"""kill -9 at random moments, twenty times over: the store ends with the bytes of an undisturbed ingest."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
from store_samples import write_key, write_pairs

from mimscale.store.verify import verify

RUN = "import sys; from mimscale.cli import main; sys.exit(main(sys.argv[1:]))"
KILLS = 20


def contents(store):
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def steps_done(store):
    """Grows with every file that the ingest finishes or begins."""
    return sum(1 for path in store.rglob("*") if path.is_file()) if store.exists() else 0


@pytest.mark.timeout(600)
def test_twenty_kills_at_random_moments_change_no_byte_of_the_store(tmp_path, survived):
    options = {
        "sources": write_pairs(tmp_path / "s", 24, (64, 60, 48)),
        "class_names": ["a", "b", "c"],
        "workers": 2,
        "parts": 24,
        "subject_key": write_key(tmp_path / "key"),
    }
    (tmp_path / "r.yaml").write_text(json.dumps(options))
    words = [sys.executable, "-c", RUN, "ingest", str(tmp_path / "r.yaml")]
    subprocess.run([*words, f"out={tmp_path}/straight"], check=True, capture_output=True)
    start = time.monotonic()
    subprocess.run([*words, f"out={tmp_path}/timed"], check=True, capture_output=True)
    whole_s = time.monotonic() - start

    moments = random.Random(7)
    killed = tmp_path / "killed"
    kills = at_work = 0
    while kills < KILLS:
        process = subprocess.Popen([*words, f"out={killed}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=moments.uniform(0, whole_s))
        except subprocess.TimeoutExpired:
            before = steps_done(killed)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            at_work += 0 < before < len(contents(tmp_path / "straight"))
        else:  # it ended first: take a few parts away, so that there is work again
            assert process.returncode == 0
            for receipt in moments.sample(sorted((killed / "receipts").glob("part-*")), 8):
                receipt.unlink()
            (killed / "manifest.parquet").unlink()
    assert at_work >= 3, "no kill came while parts were being written"
    subprocess.run([*words, f"out={killed}"], check=True, capture_output=True)
    assert contents(killed) == contents(tmp_path / "straight")
    assert verify(killed) == []
    survived["kill of an ingest at a random time"] += KILLS
