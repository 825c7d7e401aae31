"""``gift cancel``."""

from gift.cli.options import SUBMITTED
from gift.cli.plain import say


def cancel(name: SUBMITTED) -> None:
    """Cancel a submitted run; gift resume continues it."""
    from gift.many import submitting

    say(f"{submitting.cancel(name).id} was cancelled")
