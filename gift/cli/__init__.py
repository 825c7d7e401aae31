"""The command ``gift``, one file a command. What a command does belongs to `gift.jobs`."""

import os
import sys


def main() -> None:
    """Run the command line."""
    # It reports of heads that are new to it, which they are meant to be.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from gift.cli.app import app
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] == "gift":
            raise
        from gift.support.optional import install

        sys.exit(f"the command line needs {error.name}: {install('cli')}")
    app(prog_name="gift")
