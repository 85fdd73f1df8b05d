"""`python -m seats_cli` and the `seats` command: one and the same."""

import sys


def main() -> None:
    """Run the command line; the process ends with its exit code (0, 1, 2 or 130)."""
    try:
        from seats_cli.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # before or after the part of the command line that handles it itself
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
