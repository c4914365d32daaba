"""``OptunaSweeper``: search hyper-parameters with Optuna; each Hydra job is one trial.

``hydra-optuna-sweeper`` 1.2 requires Optuna below version 3 and does not support pruning.
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lightning_dist.checks import check_number

if TYPE_CHECKING:  # Optuna is an optional package that is slow to import.
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import JournalStorage
    from optuna.trial import FrozenTrial, Trial

STUDY = "lightning-dist"
_MISSING = object()
PRUNED = "pruned"  # The user attribute of a trial that the pruner ended.


class OptunaSweeper(Sweeper):
    """A Hydra sweeper that searches for the values with the best ``monitor``.

    A trial and its job have the same number. Optuna stores its data in one file, to which
    :class:`lightning_dist.cli.sweep.pruning.PruneTrial` also writes the validations of the jobs. A
    trial that fails or is interrupted stays unfinished in that file. ``resume=true`` runs such a
    trial again, in its folder, and then the missing trials.

    Args:
        n_trials: the number of trials, including those of a resumed search.
        n_jobs: the number of trials that the launcher runs together.
        storage: the path of Optuna's file.
        sampler: an Optuna sampler.
        params: the values to search, in Hydra's sweep syntax, such as
            ``{"distill.weight": "interval(0.1, 10.0)"}``. The command line can add to them and
            replace them. An interval with the tag ``log`` is searched on a logarithmic scale.

    Raises:
        ValueError: if ``n_trials`` or ``n_jobs`` is below 1.
    """

    def __init__(
        self,
        n_trials: int,
        n_jobs: int,
        storage: str,
        sampler: "BaseSampler",
        params: DictConfig | None = None,
    ) -> None:
        check_number("hydra.sweeper.n_trials", n_trials, int, least=1)
        check_number("hydra.sweeper.n_jobs", n_jobs, int, least=1)
        self.n_trials = n_trials
        self.n_jobs = n_jobs
        self.storage = Path(storage)
        self.sampler = sampler
        self.params: Any = params or {}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Store the config and create the launcher; Hydra calls this before :meth:`sweep`.

        Args:
            hydra_context: Hydra's loader of configs and its callbacks, for the launcher.
            task_function: the function that runs a job.
            config: the composed config without the overrides of the jobs.
        """
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run all trials and print the best one.

        Args:
            arguments: the overrides of the command line, some of which are sweeps.

        Raises:
            HydraException: if a searched key is not in the config, or if the earlier trials of a
                resumed search have other kinds of values for a key.
        """
        assert self.launcher is not None  # Hydra calls setup first.
        assert self.config is not None
        space, fixed = self._search_space(arguments)
        for key in space:
            if OmegaConf.select(self.config, key, default=_MISSING) is _MISSING:
                raise HydraException(
                    f"the search varies {key}, but this config has no such key (the default search "
                    "of hydra/sweeper=optuna needs distill=dist): set hydra.sweeper.params"
                )
        study = self._open_study(self.config)
        _check_space(study, space)
        OmegaConf.save(self.config, self.storage.parent / "multirun.yaml")
        for batch in self._batches(study, space):
            jobs = [[*fixed, *map(_override, t.params, t.params.values())] for t in batch]
            returns = self.launcher.launch(jobs, initial_job_idx=batch[0].number)
            for trial, job in zip(batch, returns, strict=True):
                _store_result(study, trial.number, job)
        self._print_best(study, self.config)

    def _search_space(
        self, arguments: list[str]
    ) -> tuple[dict[str, "BaseDistribution"], list[str]]:
        """Return the values to search for each key, and the overrides that all trials share."""
        presets = [f"{key}={value!s}" for key, value in self.params.items()]
        overrides = OverridesParser.create().parse_overrides([*presets, *arguments])
        last = {override.get_key_element(): override for override in overrides}
        space = {key: _distribution(x) for key, x in last.items() if x.is_sweep_override()}
        return space, [x.input_line or "" for key, x in last.items() if key not in space]

    def _open_study(self, config: DictConfig) -> "Study":
        """Create the study, or load it if the search resumes."""
        import optuna

        self.storage.parent.mkdir(parents=True, exist_ok=True)
        if not config.resume:
            self.storage.unlink(missing_ok=True)
        study = optuna.create_study(
            study_name=STUDY,
            storage=open_storage(self.storage),
            sampler=self.sampler,
            direction="maximize" if config.monitor_mode == "max" else "minimize",
            load_if_exists=True,
        )
        if study.trials:  # With its old seed, the sampler would draw the first trials again.
            self.sampler.reseed_rng()
        return study

    def _batches(
        self, study: "Study", space: dict[str, "BaseDistribution"]
    ) -> Iterator[Sequence["Trial | FrozenTrial"]]:
        """Yield the trials to run together: each unfinished trial alone, then new trials."""
        from optuna.trial import TrialState

        for trial in study.get_trials(states=[TrialState.RUNNING]):
            yield [trial]
        missing = self.n_trials - len(study.trials)
        while missing > 0:
            yield [study.ask(space) for _ in range(min(self.n_jobs, missing))]
            missing -= self.n_jobs

    def _print_best(self, study: "Study", config: DictConfig) -> None:
        """Print the best trial, its values and its folder."""
        from optuna.trial import TrialState

        if not study.get_trials(states=[TrialState.COMPLETE]):
            return
        best = study.best_trial
        job = copy.deepcopy(config)
        with read_write(job), open_dict(job):
            job.hydra.job.num = best.number
        folder = Path(config.hydra.sweep.dir) / job.hydra.sweep.subdir
        parameters = " ".join(map(_override, best.params, best.params.values()))
        print(
            f"best trial {best.number}: {config.monitor} {best.value:.4g}, {parameters}, {folder}"
        )


def _check_space(study: "Study", space: dict[str, "BaseDistribution"]) -> None:
    """Raise an error if earlier trials of a resumed search have other kinds of values for a key.

    Optuna would raise this error later, while it creates a trial, which would stay unfinished.

    Raises:
        HydraException: if the values for a key are not compatible with those of earlier trials.
    """
    from optuna.distributions import check_distribution_compatibility

    for trial in study.trials:
        for key in space.keys() & trial.distributions.keys():
            try:
                check_distribution_compatibility(trial.distributions[key], space[key])
            except ValueError as error:
                raise HydraException(
                    f"the earlier trials of this search have other kinds of values for {key} "
                    f"({error}): resume with the same sweeps, or choose another hydra.sweep.dir"
                ) from error


def _distribution(override: Override) -> "BaseDistribution":
    """Convert a sweep of Hydra, an interval or a list of choices, to an Optuna distribution."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    interval = override.value()
    if not isinstance(interval, IntervalSweep):
        return CategoricalDistribution(tuple(override.sweep_string_iterator()))
    low, high, log = interval.start, interval.end, "log" in interval.tags
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    assert low is not None
    assert high is not None
    return FloatDistribution(low, high, log=log)


def _override(key: str, value: Any) -> str:
    """Return the override for a value; a float has four digits, so that it fits into a table."""
    return f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"


def _store_result(study: "Study", number: int, job: JobReturn) -> None:
    """Store the result of a job in its trial; a trial without a result stays unfinished."""
    from optuna.trial import TrialState

    value = job.return_value
    if value is not None and value == value:  # A run that did not complete returns NaN.
        study.tell(number, value)
    elif PRUNED in study.trials[number].user_attrs:
        study.tell(number, state=TrialState.PRUNED)


def open_storage(path: Path) -> "JournalStorage":
    """Open a file as Optuna storage, to which all processes of a search can write.

    Args:
        path: the path of the file, which is created if it does not exist.

    Returns:
        The storage.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(path)))
