"""`python -m egtrain` and the console script: an expected failure is one line and an exit code."""

import io
import os
import sys


def main() -> None:
    """Run the command line and exit with the code that the README documents."""
    for stream in (sys.stdout, sys.stderr):
        # Replace what the terminal's encoding lacks: no run should fail over a "±".
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    from egtrain.cli import app
    from egtrain.errors import EgtrainError

    is_rank = "LOCAL_RANK" in os.environ
    code = 0
    failure: BaseException | None = None
    try:
        app(standalone_mode=True)
    except EgtrainError as error:
        code, failure = error.exit_code, error
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException as error:
        if not is_rank:
            raise
        code, failure = 1, error
    if is_rank:
        from egtrain.ranks.failures import end_rank

        end_rank(code, failure)
    if failure is not None:
        print(f"egtrain: {failure}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
