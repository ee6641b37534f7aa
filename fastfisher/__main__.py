"""``python -m fastfisher`` is the command line ``fastfisher``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
