import json

import pytest
from fake_runs import fake_run, write_lines

from mimscale.errors import ConfigError
from mimscale.report.charts import moving_mean
from mimscale.report.facts import read_run


def line(step, **values):
    return {"step": step, "loss": 1.0, "step_s": 0.5, "data_wait_s": 0.1, "samples_per_s": 16.0} | values


def test_a_step_that_was_done_twice_counts_as_the_run_went_on(tmp_path):
    run = fake_run(tmp_path / "run", steps=3)
    write_lines(run / "metrics.jsonl", [line(1), line(2, loss=9.0), line(2, loss=2.0), line(3, loss=3.0)])
    assert [entry["loss"] for entry in read_run(run).steps] == [1.0, 2.0, 3.0]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    run = fake_run(tmp_path / "run", steps=3)
    (run / "metrics.jsonl").write_text(json.dumps(line(1)) + "\n" + '{"step": 2, "lo')
    assert [entry["step"] for entry in read_run(run).steps] == [1]


def test_data_wait_is_a_part_of_the_step_time_after_warm_up(tmp_path):
    run = fake_run(tmp_path / "run", steps=4)
    write_lines(
        run / "metrics.jsonl", [line(1, data_wait_s=0.5), line(2, data_wait_s=0.5), line(3), line(4, data_wait_s=0.2)]
    )
    assert read_run(run).data_wait_percent == pytest.approx(100 * 0.3 / 1.0)


def test_a_run_shorter_than_the_warm_up_is_measured_as_it_is(tmp_path):
    run = fake_run(tmp_path / "run", steps=1)
    write_lines(run / "metrics.jsonl", [line(1)])
    assert read_run(run).data_wait_percent == pytest.approx(20.0)


def test_a_run_that_has_not_begun_has_no_numbers(tmp_path):
    run = fake_run(tmp_path / "run", steps=5)
    (run / "metrics.jsonl").unlink()
    (run / "outcome.json").unlink()
    facts = read_run(run)
    assert (facts.last_step, facts.state, facts.data_wait_percent) == (0, "not ended", None)
    assert facts.last("loss") is None
    assert facts.percentile("step_s", 50) is None


def test_percentiles_are_logged_values(tmp_path):
    run = fake_run(tmp_path / "run", steps=22)
    write_lines(run / "metrics.jsonl", [line(step, step_s=float(step)) for step in range(1, 23)])
    facts = read_run(run)
    assert facts.percentile("step_s", 50) == 13.0
    assert facts.percentile("step_s", 95) == 22.0


def test_a_folder_that_is_no_run_directory_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no config.yaml, so this is no run directory"):
        read_run(tmp_path)


def test_a_config_of_another_kind_is_refused_by_name(tmp_path):
    run = fake_run(tmp_path / "run", kind="study")
    with pytest.raises(ConfigError, match="kind='study', expected pretrain or finetune"):
        read_run(run)


def test_a_damaged_scores_file_is_named(tmp_path):
    run = fake_run(tmp_path / "run")
    (run / "evaluate").mkdir()
    (run / "evaluate" / "scores.json").write_text("{")
    with pytest.raises(ConfigError, match=r"scores.json: not valid JSON"):
        read_run(run)


def test_a_moving_mean_looks_back_as_far_as_there_is_something():
    assert moving_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
