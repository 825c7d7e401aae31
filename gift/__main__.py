"""``python -m gift``: the command line."""

from gift.cli import main

if __name__ == "__main__":
    main()
