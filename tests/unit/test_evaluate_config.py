import pytest

from mimscale.config import load_config
from mimscale.errors import ConfigError
from mimscale.evaluate.config import EvaluateConfig


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("overlap=1", "overlap=1.0: must be at least 0 and below 1"),
        ("overlap=-0.1", "overlap=-0.1"),
        ("batch=0", "evaluate.batch=0: must be above 0"),
        ("crops=0", "evaluate.crops=0: must be above 0"),
        ("nsd_tolerance_mm=0", "evaluate.nsd_tolerance_mm=0.0: must be above 0"),
        ("pictures=-1", "pictures=-1: must be at least 0"),
        ("threads=0", "evaluate.threads=0: must be above 0"),
        ("flips=[x,x]", "flips=['x', 'x']: names an axis twice"),
        ("flips=[w]", "flips.0: Input should be 'z', 'y' or 'x'"),
        ("blending=mean", "blending: Input should be 'gaussian' or 'constant'"),
        ("device=tpu", "device: Input should be 'auto', 'cpu' or 'cuda', got 'tpu'"),
        ("unlabelled=maybe", "unlabelled: Input should be 'refuse' or 'skip'"),
        ("overlapp=0.5", "overlapp: no such key, got 0.5; did you mean overlap?"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(override, text):
    with pytest.raises(ConfigError) as error:
        load_config(EvaluateConfig, None, ["run_dir=runs/a", override])
    assert text in str(error.value)


def test_only_the_run_directory_must_be_given():
    config = load_config(EvaluateConfig, None, ["run_dir=runs/a"])
    assert (config.store, config.split, config.checkpoint) == (None, "val", "newest")
    with pytest.raises(ConfigError, match="run_dir"):
        load_config(EvaluateConfig, None, [])
