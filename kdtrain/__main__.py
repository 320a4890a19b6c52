"""`python -m kdtrain` and the console command `kdtrain`: the command line of kdtrain/cli."""

import signal
import sys


def main() -> int:
    """Run the command of sys.argv; the exit status. A missing package is one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from kdtrain.cli import main as command

        status = command()
        # the command is done: a signal while the interpreter ends must not change its status
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        return status
    except KeyboardInterrupt:  # before the command handles signals
        return 130
    except ModuleNotFoundError as error:
        missing = error.name or "kdtrain"
        if missing.partition(".")[0] in ("kdtrain", "kdkernels"):
            raise
        needs = f'kdtrain needs the train extra: pip install ".[train]" (no module {missing})'
        print(needs, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
