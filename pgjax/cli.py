"""The `pgjax` command. Exit status 0 done, 2 wrong usage or input (one line on stderr), 1 failure, 143 stopped by
SIGTERM with the run saved."""

import errno
import sys

from pgjax.arguments import parser
from pgjax.commands.data import data
from pgjax.commands.guard import calibrate, evaluate, moderate, serve
from pgjax.commands.rewriter import demo_rewriter, evaluate_rewriter, rewrite, synthesize
from pgjax.commands.training import bank, demo, export, plan, report, reward, score, sft, train
from pgjax.parallel.start import complain

RUNS = (
    *(train, plan, demo, moderate, evaluate, calibrate, serve, score, export, reward, bank, data, report),
    *(synthesize, sft, rewrite, evaluate_rewriter, demo_rewriter),
)
COMMANDS = {run.__name__.replace("_", "-"): run for run in RUNS}


def main(argv: list[str] | None = None) -> int:
    try:
        args, rest = parser().parse_known_args(argv)
        COMMANDS[args.command](args, rest)
    except ValueError as error:
        complain(error)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        complain(f"{error.filename or 'a file'} cannot be written: {error.strerror}; make room, and a run goes on from its last checkpoint")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
