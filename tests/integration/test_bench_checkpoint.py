import json

import pytest
import torch
from rank_pool import run_ranks

from mimscale.bench.checkpoint import as_text

pytestmark = pytest.mark.two_process


def test_the_benchmark_of_checkpoints_saves_in_both_modes_and_loads(tmp_path):
    words = ["bench", "checkpoint", "demo/pretrain", "model={dim: 48, depth: 2, heads: 2}", "--json"]
    ended = run_ranks([*words, "--repeats", "1", "--folder", str(tmp_path)])
    codes = {rank.code for rank in ended}
    assert codes in ({0}, {1}), ended[0].err  # of a model this small the commit is all, so that its stall says nothing
    result = json.loads(ended[0].out)
    assert (result["ranks"], result["checkpoint_bytes"] > 16 * result["parameters"]) == (2, True)
    assert all(result["stall_median_s"][mode] > 0 for mode in ("sync", "background"))
    assert (codes == {0}) == (result["stall_percent"] <= 25)
    assert min(result["load_s"] + result["verify_s"] + result["write_s"]) > 0
    assert set(result["ceiling_s"]) == {"copy", "write", "read", "hash"}
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in result["ceiling_s"].values())
    assert result["packages"]["torch"] == torch.__version__
    told = as_text(result)
    assert f"at most 25 %: {'reached' if codes == {0} else 'missed'}" in told
    assert "training stands still, background" in told
    assert " s: a copy in memory + a plain write and flush | " in told
    assert "a plain read one run" in told  # of one repeat there is no spread
    assert list(tmp_path.iterdir()) == []
