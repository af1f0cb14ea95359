"""The `pgjax` command. Exit status 0 done, 2 wrong usage or input (one line on stderr), 1 failure, 143 stopped by
SIGTERM with the run saved."""

import sys

from pgjax.arguments import parser
from pgjax.commands.data import data
from pgjax.commands.guard import calibrate, evaluate, moderate, serve
from pgjax.commands.rewriter import demo_rewriter, evaluate_rewriter, rewrite, synthesize
from pgjax.commands.training import bank, demo, export, plan, report, reward, score, sft, train
from pgjax.parallel.start import complain, known

RUNS = (
    *(train, plan, demo, moderate, evaluate, calibrate, serve, score, export, reward, bank, data, report),
    *(synthesize, sft, rewrite, evaluate_rewriter, demo_rewriter),
)
COMMANDS = {run.__name__.replace("_", "-"): run for run in RUNS}


def main(argv: list[str] | None = None) -> int:
    try:
        args, rest = parser().parse_known_args(argv)
        COMMANDS[args.command](args, rest)
    except (ValueError, OSError) as error:
        if not (fault := known(error)):
            raise
        message, status = fault
        complain(message)
        return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
