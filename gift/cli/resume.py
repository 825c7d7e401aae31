"""``gift resume``."""

from gift.cli.options import SBATCH, SUBMITTED, sbatch_options
from gift.cli.plain import say


def resume(name: SUBMITTED, sbatch: SBATCH = None) -> None:
    """Queue a run again that was cancelled or failed; it continues from its checkpoint."""
    from gift.many import submitting

    say(f"queued as {submitting.resume(name, sbatch_options(sbatch)).id}")
