"""What every test may use."""

import os
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI every skip is a failure, however a test asked for it."""
    report = yield
    if os.environ.get("CI") and report.skipped:
        report.outcome, report.longrepr = "failed", f"skipped, and CI may not: {call.excinfo.value}"
    return report


def skip_unless(condition: bool, reason: str) -> None:
    """Skip a test on a machine that lacks something; in CI that is a failure, so that nothing goes untested unseen."""
    if condition:
        return
    if os.environ.get("CI"):
        pytest.fail(f"would skip, and CI may not: {reason}")
    pytest.skip(reason)
