"""Runs niwaki's command line, and ends when the process that started it is gone.

A worker of a sweep that is killed must not leave a run behind that works on for nobody:
`python -m niwaki.sweep.watched PARENT ...` looks every second whether PARENT still is its parent.
"""

import os
import runpy
import sys
import threading
import time


def watch(parent: int, seconds: float = 1.0) -> None:
    """End this process, whatever it does, once `parent` is not its parent any more."""
    while os.getppid() == parent:
        time.sleep(seconds)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=watch, args=(int(sys.argv[1]),), daemon=True).start()
    sys.argv = ["niwaki", *sys.argv[2:]]
    runpy.run_module("niwaki", run_name="__main__")
