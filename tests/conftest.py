"""What every test may use."""

import os

import pytest


def skip_unless(condition: bool, reason: str) -> None:
    """Skip a test on a machine that lacks something; in CI that is a failure, so that nothing goes untested unseen."""
    if condition:
        return
    if os.environ.get("CI"):
        pytest.fail(f"would skip, and CI may not: {reason}")
    pytest.skip(reason)
