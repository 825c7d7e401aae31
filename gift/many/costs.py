"""What jobs would train, counted before they run."""

import json
from typing import Any

from torch import nn

from gift.budget import suggest
from gift.budget.budget import Budget
from gift.engine.claims import size_of
from gift.engine.dry_run import Cost, cost_of, on_meta, rehearsed
from gift.errors import JobError
from gift.jobs.examples import job_examples, job_reader
from gift.jobs.heads import with_head
from gift.jobs.models import Job, Strategy
from gift.jobs.networks import job_network
from gift.strategies import FineTuningStrategy


class Costs:
    """Counts what jobs train, on copies of their networks that have no values.

    Each network is loaded once.

    Args:
        network: replaces the network that jobs name, as in `gift.jobs.run_job`.
    """

    def __init__(self, network: Any = None) -> None:
        self.network = network
        self._loaded: dict[str, tuple[nn.Module, Any, Any, bool]] = {}

    def of(self, job: Job) -> Cost:
        """Return the number of trained parameters, and the size of the state that is saved.

        Raises:
            ValueError: if the strategy does not fit the network.
        """
        net, strategy = self._prepared(job)
        with rehearsed(net, strategy):
            return cost_of(net)

    def excess(self, job: Job, budget: int | float | str) -> float:
        """Return by which factor a job exceeds a budget of `gift.suggest`: 0 if it does not.

        Raises:
            ValueError: if the budget is not one, or the strategy does not fit the network.
        """
        net, _ = self._prepared(job)
        limit, cost = Budget.of(budget, size_of(nn.Module.parameters(net))), self.of(job)
        spent = cost.bytes if limit.in_bytes else cost.parameters
        return max(0.0, spent / max(limit.limit, 1) - 1)

    def sized(self, job: Job, budget: int | float | str) -> Job:
        """Return the job with the sizes that `gift.suggest` chooses for a budget.

        A strategy that has no size is kept as it is.

        Raises:
            JobError: if no size is within the budget.
        """
        net, strategy = self._prepared(job)
        try:
            made = suggest(net, budget, strategy).strategy
        except ValueError as error:
            if "no cap" in str(error) or "has a size to choose" in str(error):
                return job
            raise JobError(f"a budget of {budget} does not fit the job", [str(error)]) from error
        section = Strategy.model_validate({**made.to_config(), "head": job.strategy.head})
        return job.model_copy(update={"strategy": section})

    def _prepared(self, job: Job) -> tuple[nn.Module, FineTuningStrategy]:
        parts = {"network": job.to_config()["network"], "data": job.to_config()["data"]}
        key = json.dumps([parts, job.training.seed], sort_keys=True, default=str)
        if key not in self._loaded:
            loaded = job_network(job, self.network)
            reader = job_reader(job.data, loaded.reader)
            train, _, _ = job_examples(job.data, reader, job.training.seed or 0)
            named = None if self.network is not None else job.network
            is_random = named is not None and named.weights is None
            self._loaded[key] = on_meta(loaded.net), loaded, train, is_random
        net, loaded, train, is_random = self._loaded[key]
        return net, with_head(job.strategy, loaded, train, is_random)
