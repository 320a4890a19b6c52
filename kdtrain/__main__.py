"""`python -m kdtrain`: the command line of kdtrain/cli."""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from kdtrain.cli import main

        status = main()
    except KeyboardInterrupt:  # before main hears it
        status = 130
    sys.exit(status)
