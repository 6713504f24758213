"""The study: which plan is tried next, and what is known of all, in a storage that several processes may share."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from skipvit_fx.errors import SearchError, first_line
from skipvit_fx.optional import need
from skipvit_fx.plan import Plan
from skipvit_fx.planner.space import Space

POPULATION = 24
"""Plans of a generation of NSGA-II: a few generations in the usual number of trials."""

MOST_REFUSED = 500
"""So many proposals in succession that are known, refused or too expensive mean that there are no others."""

_PLAN = "plan "
"""Begins the name of an attribute of the study that holds what is known of a plan."""

_ATTEMPTS = 5
"""How often a database is opened whose tables are being made."""

_HINT = (
    "give a file ending in .log, or a URL: journal:///study.log, sqlite:///study.db or "
    "postgresql://user@host/database"
)


class Known(NamedTuple):
    """What a study knows of a plan: multiply-adds, quality and its spread."""

    macs: int
    quality: float
    spread: float | None


def optuna() -> Any:
    """The package.

    Raises:
        SearchError: it is not installed.
    """
    return need("optuna", "search", SearchError)


def storage_at(place: Any) -> Any:
    """The storage that a URL, a file name or a storage of optuna's stands for; ``None`` is memory.

    Raises:
        SearchError: there is none, or it cannot be opened.
    """
    if place is None or not isinstance(place, str | Path):
        return place
    storages = optuna().storages
    text = str(place)
    try:
        if text.startswith("journal://") or "://" not in text:
            path = Path(urlsplit(text).path if "://" in text else text)
            if "://" not in text and path.suffix != ".log":
                raise SearchError(f"cannot tell what kind of storage {text!r} is", hint=_HINT)
            journal = need("optuna.storages.journal", "search", SearchError)
            return storages.JournalStorage(journal.JournalFileBackend(str(path)))
        return _database(storages, text)
    except SearchError:
        raise
    except _failures() as error:
        missing = isinstance(error, ModuleNotFoundError)
        driver = "install the driver of the database: for PostgreSQL, pip install 'psycopg[binary]'"
        raise SearchError(
            f"the storage {_without_password(text)!r} cannot be opened: {first_line(error)}",
            hint=driver if missing else _HINT,
        ) from error


def _database(storages: Any, url: str) -> Any:
    """A database, whose tables another process may be making at this moment."""
    for _ in range(_ATTEMPTS):
        try:
            return storages.RDBStorage(url)
        except _database_error() as error:
            if "already exists" not in str(error):
                raise
            time.sleep(1)
    return storages.RDBStorage(url)


def _failures() -> tuple[type[Exception], ...]:
    """What optuna raises where a storage cannot be opened; a RuntimeError is that of tables of another version."""
    theirs = optuna().exceptions.OptunaError, _database_error()
    return OSError, ValueError, RuntimeError, ImportError, *theirs


def _database_error() -> type[Exception]:
    kind: type[Exception] = need("sqlalchemy.exc", "search", SearchError).SQLAlchemyError
    return kind


def _without_password(text: str) -> str:
    found = urlsplit(text).password
    return text.replace(f":{found}@", ":***@") if found else text


class Proposal(NamedTuple):
    """A plan to be evaluated: the sampler's trial, and what it means."""

    trial: Any
    plan: Plan


class Study:
    """Plans and what is known of them, by notation.

    A plan is proposed by NSGA-II, seeded by the search's seed and the number of trials, so that a study that was
    interrupted goes on as if it had not been. A process that is killed loses no more than the plan it was evaluating.
    """

    def __init__(self, name: str, storage: Any, seed: int, space: Space) -> None:
        """Open the study with this name, or begin it.

        Raises:
            SearchError: the storage cannot be used.
        """
        self._optuna = optuna()
        self._seed, self._space = seed, space
        self._ranges = {
            one.name: self._optuna.distributions.IntDistribution(one.low, one.high)
            for one in space.dimensions()
        }
        self._opened = storage_at(storage)
        self._closes = self._opened is not storage
        said = self._optuna.logging.get_verbosity()
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        try:
            self._own = self._optuna.create_study(
                study_name=name,
                storage=self._opened,
                directions=["minimize", "maximize"],
                load_if_exists=True,
            )
        finally:
            self._optuna.logging.set_verbosity(said)
        self._rejected: set[str] = set()

    def close(self) -> None:
        """Close the connections to a database that was opened here."""
        if self._closes and hasattr(self._opened, "engine"):
            self._opened.remove_session()
            self._opened.engine.dispose()

    def known(self) -> dict[str, Known]:
        """Every plan that was evaluated, by any process."""
        found = {}
        for name, value in self._own.user_attrs.items():
            if name.startswith(_PLAN):
                found[name.removeprefix(_PLAN)] = Known(*value)
        for trial in self._trials("COMPLETE"):
            macs, quality = trial.values
            found.setdefault(
                trial.user_attrs["plan"], Known(int(macs), quality, trial.user_attrs["spread"])
            )
        return found

    def note(self, plan: Plan, known: Known) -> None:
        """Keep what was found of a plan that the sampler did not propose.

        It is one of its trials if the sampler could have; otherwise it is an attribute of the study.
        """
        values = self._space.values(plan)
        if values is None:
            self._own.set_user_attr(f"{_PLAN}{plan}", list(known))
            return
        self._own.add_trial(
            self._optuna.trial.create_trial(
                values=[known.macs, known.quality],
                params=values,
                distributions=self._ranges,
                user_attrs={"plan": str(plan), "spread": known.spread},
            )
        )

    def ask(self) -> Proposal | None:
        """A plan that nobody has evaluated or is evaluating; ``None`` if there seems to be no other."""
        taken = {*self.known(), *self._rejected}
        for _ in range(MOST_REFUSED):
            self._own.sampler = self._sampler()
            trial = self._own.ask(self._ranges)
            plan = self._space.plan(trial.params)
            running = {
                other.user_attrs.get("plan")
                for other in self._trials("RUNNING")
                if other.number != trial.number
            }
            if plan.spans and str(plan) not in taken | running:
                trial.set_user_attr("plan", str(plan))
                return Proposal(trial, plan)
            self._own.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        return None

    def _sampler(self) -> Any:
        seed = self._seed * 1_000_003 + len(self._own.get_trials(deepcopy=False))
        sampler = self._optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed % 2**32)
        ranges = dict(sorted(self._ranges.items()))
        # those of every trial, which it would otherwise compare with one another at each proposal
        sampler.infer_relative_search_space = lambda *_: ranges
        return sampler

    def tell(self, proposal: Proposal, known: Known) -> None:
        """Keep what was found of a plan."""
        proposal.trial.set_user_attr("spread", known.spread)
        self._own.tell(proposal.trial, [known.macs, known.quality])

    def reject(self, proposal: Proposal) -> None:
        """Note that a plan cannot be evaluated, or was not to the end."""
        self._rejected.add(str(proposal.plan))
        self._own.tell(proposal.trial, state=self._optuna.trial.TrialState.FAIL)

    def _trials(self, state: str) -> Any:
        states = (self._optuna.trial.TrialState[state],)
        return self._own.get_trials(deepcopy=False, states=states)
