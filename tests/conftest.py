"""What every test may use."""

import os
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

SURVIVED = pytest.StashKey[Counter[str]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI every skip is a failure, however a test asked for it."""
    report = yield
    if os.environ.get("CI") and report.skipped:
        report.outcome, report.longrepr = "failed", f"skipped, and CI may not: {call.excinfo.value}"
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that are marked `cuda` belong to machines with a device; on others they are left out, and not skipped."""
    if Path("/dev/nvidiactl").exists():
        return
    without = [item for item in items if item.get_closest_marker("cuda")]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


def skip_unless(condition: bool, reason: str) -> None:
    """Skip a test on a machine that lacks something; in CI that is a failure, so that nothing goes untested unseen."""
    if condition:
        return
    if os.environ.get("CI"):
        pytest.fail(f"would skip, and CI may not: {reason}")
    pytest.skip(reason)


@pytest.fixture
def survived(request: pytest.FixtureRequest) -> Counter[str]:
    """Faults that this session has injected and that lost nothing, by kind. A test counts one after it has checked."""
    return request.config.stash.setdefault(SURVIVED, Counter())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table of faults, under the results of a session that has injected some."""
    counts = config.stash.get(SURVIVED, Counter())
    if counts:
        terminalreporter.section("faults injected and survived")
        for kind, count in sorted(counts.items()):
            terminalreporter.write_line(f"{count:6} {kind}")
        terminalreporter.write_line(f"{counts.total():6} in all")
