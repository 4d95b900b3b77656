"""`python -m raygym`, and the console script."""

import os
import sys

_NOBODY_READS = 141
"""What a shell says of a program that SIGPIPE has ended."""


def main() -> int:
    """The command line. What is left unread, as by `| head`, ends it without a word."""
    try:
        try:
            return _command()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end, which must find nothing wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _NOBODY_READS


def _command() -> int:
    """`doctor` is apart from the others: it is for machines where their imports may fail."""
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
