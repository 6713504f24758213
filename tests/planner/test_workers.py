"""Several processes work on one study, and one of them is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from skipvit_fx.planner.study import optuna, storage_at

pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parents[1]
TRIALS = 40
PORT = 54329


def worker(storage: str, trials: int = TRIALS, seconds: float = 0.1) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "support.search_worker", storage, str(trials), str(seconds)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )


def killed(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def lines_until(process: subprocess.Popen[str], evaluated: int) -> None:
    """Read what it prints until so many plans are known."""
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)[0] >= evaluated:
            return
    raise AssertionError("it ended early")


def front(process: subprocess.Popen[str]) -> list[str]:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    plans: list[str] = json.loads(said.splitlines()[-1])
    return plans


class Kept:
    """What a study holds in its storage.

    Attributes:
        complete, running: the plans of trials in these states.
        others: those that the sampler could not have proposed.
    """

    def __init__(self, place: str) -> None:
        storage = storage_at(place)
        (name,) = optuna().get_all_study_names(storage)
        study = optuna().load_study(study_name=name, storage=storage)
        plans: dict[str, list[str]] = {"COMPLETE": [], "RUNNING": []}
        for trial in study.get_trials():
            plans.setdefault(trial.state.name, []).append(trial.user_attrs.get("plan", ""))
        self.complete, self.running = plans["COMPLETE"], plans["RUNNING"]
        self.others = [name for name in study.user_attrs if name.startswith("plan ")]
        if hasattr(storage, "engine"):
            storage.remove_session()
            storage.engine.dispose()


def one_is_killed_and_another_goes_on(storage: str) -> None:
    first, second = worker(storage), worker(storage)
    lines_until(first, 18)
    killed(first)
    whole = front(second)
    kept = Kept(storage)
    assert len(kept.running) <= 1
    assert len({*kept.complete}) + len(kept.others) >= TRIALS
    again = worker(storage)
    assert front(again) == whole


def test_a_journal_file(tmp_path: Path) -> None:
    storage = str(tmp_path / "study.log")
    one_is_killed_and_another_goes_on(storage)


def test_a_database_file(tmp_path: Path) -> None:
    one_is_killed_and_another_goes_on(f"sqlite:///{tmp_path}/study.db")


def test_a_killed_search_is_resumed_and_nothing_is_evaluated_twice(tmp_path: Path) -> None:
    storage = str(tmp_path / "study.log")
    first = worker(storage)
    lines_until(first, 24)
    killed(first)
    kept = Kept(storage)
    before = kept.complete
    assert len(before) + len(kept.others) >= 24
    resumed = front(worker(storage))
    after = Kept(storage).complete
    assert after[: len(before)] == before
    assert len(after) == len(set(after))
    undisturbed = front(worker(str(tmp_path / "other.log")))
    assert resumed == undisturbed


@pytest.fixture
def postgresql() -> Iterator[str]:
    """A server of its own, with Debian's package, in a folder that its user can read."""
    if not any(map(importlib.util.find_spec, ("psycopg", "psycopg2"))):
        pytest.skip("pip install 'psycopg[binary]'")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("apt-get install postgresql")
    with tempfile.TemporaryDirectory() as folder:
        user: list[str] = []
        if os.getuid() == 0:
            user = ["runuser", "-u", "postgres", "--"]
            shutil.chown(folder, "postgres", "postgres")

        def run(program: str, *arguments: str) -> None:
            command = [*user, str(programs[-1] / program), "-D", f"{folder}/data", *arguments]
            subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)

        run("initdb", "-A", "trust", "-U", "postgres")
        options = f"-p {PORT} -k {folder} -c listen_addresses=127.0.0.1"
        run("pg_ctl", "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql://postgres@127.0.0.1:{PORT}/postgres"
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")


def test_postgresql(postgresql: str) -> None:
    one_is_killed_and_another_goes_on(postgresql)
