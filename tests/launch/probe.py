"""Stands in for the trainer: waits for SIGUSR1, then exits with the code it is given."""

import os
import signal
import sys
import time
from pathlib import Path

caught = []
signal.signal(signal.SIGUSR1, lambda *_: caught.append(True))
rank, folder = os.environ["RANK"], Path(os.environ["PROBE_FOLDER"])
folder.joinpath(f"ready{rank}").write_text(" ".join(sys.argv[1:]))
deadline = time.monotonic() + 60
while not caught and time.monotonic() < deadline:
    time.sleep(0.05)
folder.joinpath(f"saved{rank}").touch()
sys.exit(int(os.environ["PROBE_CODE"]) if caught else 99)
