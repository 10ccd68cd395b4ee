"""`python -m egtrain` and the console script: one line for an expected failure, and its exit
code.
"""

import io
import os
import sys


def main() -> None:
    """Run the command line and exit with the code that the README documents."""
    for stream in (sys.stdout, sys.stderr):
        # What the encoding of a terminal lacks is replaced: no run ends for the sake of a "±".
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    from egtrain.cli import app
    from egtrain.errors import EgtrainError

    code = 0
    try:
        app(standalone_mode=True)
    except EgtrainError as error:
        code = error.exit_code
        if os.environ.get("RANK", "0") == "0":
            print(f"egtrain: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    if "LOCAL_RANK" in os.environ:
        from egtrain.launch import leave_rank

        leave_rank(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
