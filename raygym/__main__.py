"""`python -m raygym`, and the console script."""

import sys


def main() -> int:
    """The command line; `doctor` apart from it, which is for machines where the imports of the rest may fail."""
    if sys.version_info < (3, 11):  # noqa: UP036 - a checkout may be tried with any
        print("raygym: needs Python 3.11 or 3.12, and this is " + sys.version.split()[0], file=sys.stderr)
        return 1
    if sys.argv[1:2] == ["doctor"]:
        from raygym.doctor.command import main as doctor

        return doctor(sys.argv[2:])
    try:
        from raygym.cli import main as command
    except ImportError as error:
        print(f"raygym: {error}; `python -m raygym doctor` says what is missing", file=sys.stderr)
        return 1
    return command()


if __name__ == "__main__":
    sys.exit(main())
