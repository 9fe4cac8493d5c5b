"""One Slurm for all tests of this folder, and runs on it that take seconds."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import skip_unless
from devcluster import STEPS, DevCluster, Setup, Site, why_not_here


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    """The cluster of this session, not up yet."""
    lacks = why_not_here()
    skip_unless(lacks is None, str(lacks))
    cluster = DevCluster(tmp_path_factory.mktemp("slurm") / "cluster")
    yield cluster
    if cluster.setup is not None:
        cluster.take_down()


@pytest.fixture
def cluster(request: pytest.FixtureRequest, machine: DevCluster) -> Iterator[DevCluster]:
    """The cluster, up and idle; with another setup by `parametrize("cluster", [Setup(...)], indirect=True)`."""
    machine.bring_up(getattr(request, "param", Setup()))
    yield machine
    if machine.setup is not None:
        machine.up()  # what the test has killed
        machine.cancel_all()


@pytest.fixture
def site(tmp_path: Path, cluster: DevCluster) -> Site:
    """A store, a recipe and a profile, and runs on them."""
    return Site(tmp_path, cluster)


@pytest.fixture(scope="session")
def undisturbed(machine: DevCluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site with a run of `STEPS` steps on 2 nodes x 2 processes that nobody disturbed."""
    machine.bring_up(Setup())
    site = Site(tmp_path_factory.mktemp("undisturbed"), machine)
    site.job_id = site.submit(steps=STEPS)
    machine.wait_for_state(site.job_id, "COMPLETED", "FAILED")
    site.wait_until_finished()

    def accounted() -> list[str]:  # slurmdbd hears of the end a moment later
        words = ("sacct", "-n", "-P", f"--jobs={site.job_id}", "--format=JobID,State,ExitCode")
        lines = machine.command(*words).splitlines()
        return lines if lines and all("COMPLETED" in line for line in lines) else []

    # Now: the next test may bring up a cluster of another setup, with accounts of its own.
    site.accounts = machine.wait_for("sacct to know the end", accounted, timeout_s=30)
    return site
