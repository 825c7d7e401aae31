"""Job files and runs: a network, its examples and how it is trained.

The training loop is in `gift.training`.
"""

from gift.support.optional import require

require("pydantic", "cli")  # everything here is built on it

from gift.errors import JobError  # noqa: E402
from gift.jobs.guessing import guess_job  # noqa: E402
from gift.jobs.initial import init_text  # noqa: E402
from gift.jobs.kinds import KINDS  # noqa: E402
from gift.jobs.merged import write_merged  # noqa: E402
from gift.jobs.models import Job  # noqa: E402
from gift.jobs.reading import read_job, write_job  # noqa: E402
from gift.jobs.running import run_job  # noqa: E402
from gift.jobs.runs import Run  # noqa: E402

__all__ = [
    "KINDS",
    "Job",
    "JobError",
    "Run",
    "guess_job",
    "init_text",
    "read_job",
    "run_job",
    "write_job",
    "write_merged",
]
