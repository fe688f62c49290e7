"""Another rank of a measurement: `python -m saccade.bench.ranks.other_rank COMMAND OPTIONS PARENT`, started by join.py.

It runs the command that rank 0 runs, and prints nothing but why it cannot go on.
"""

import json
import os
import sys
import threading
import time
from typing import NoReturn

from saccade.bench.commands import measure_command
from saccade.errors import SaccadeError


def end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def main() -> NoReturn:
    command, asked, parent = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    code = 0
    try:
        measure_command(command, asked, lambda _: None)
    except SaccadeError as error:
        print(f"saccade: rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
        code = 2
    os._exit(code)  # the interpreter's own end would wait for groups whose other ranks are gone


if __name__ == "__main__":
    main()
