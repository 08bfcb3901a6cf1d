"""`python -m tiltscope` and the `tiltscope` command."""

import sys


def main() -> int:
    from tiltscope.engine.cli.main import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
