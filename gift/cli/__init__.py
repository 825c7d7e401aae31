"""The ``gift`` command, one file for each subcommand. Their work is done in `gift.jobs`."""

import os
import sys


def main() -> None:
    """Run the command line."""
    # It would report new heads, which are intended.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # bars of loading and downloading are for terminals, too
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        from gift.cli.app import app
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] == "gift":
            raise
        from gift.support.optional import install

        sys.exit(f"the command line needs {error.name}: {install('cli')}")
    app(prog_name="gift")
