# SPDX-License-Identifier: Apache-2.0
"""torchrun without a report of its own: the ranks have said why they ended.

    python -m tools.torchrun --nnodes 1 --nproc-per-node 2 train.py ...

torchrun itself adds log lines, a table and a traceback to every error and every stop by a signal,
which bury the message of train.py. A rank that a signal has killed could say nothing and is named.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    logging.disable(logging.ERROR)  # in this process; the ranks have loggers of their own
    try:
        main()
    except SignalException as end:
        sys.exit(128 + end.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"torchrun: rank {rank} was killed by {name}", file=sys.stderr)
        sys.exit(1)
