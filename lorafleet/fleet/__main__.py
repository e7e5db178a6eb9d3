"""The supervisor's process: `python -m lorafleet.fleet --state FOLDER`.

It needs a state folder that `lorafleet up` prepared, and stays in the foreground until SIGTERM or SIGINT.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from lorafleet.fleet.config import FleetConfig
from lorafleet.fleet.lock import StateLock
from lorafleet.fleet.logfile import LogPump
from lorafleet.fleet.services import children
from lorafleet.fleet.state import StateFolder
from lorafleet.fleet.supervisor import Supervisor
from services.common import logs

EXIT_ALREADY_RUNNING = 3
EXIT_NOT_PREPARED = 4


def main() -> int:
    """Run one fleet; return 0 after a clean stop."""
    parser = argparse.ArgumentParser(prog="python -m lorafleet.fleet")
    parser.add_argument("--state", type=Path, required=True)
    state = StateFolder(parser.parse_args().state)
    logs.configure("fleet")
    config = FleetConfig.load(state)
    if config is None:
        sys.stderr.write(f"{state.config_file} is missing; start with `lorafleet up`\n")
        return EXIT_NOT_PREPARED
    lock = StateLock.take(state.lock_file)
    if lock is None:
        sys.stderr.write(f"a fleet already runs on {state.root}\n")
        return EXIT_ALREADY_RUNNING
    pump = LogPump()
    supervisor = Supervisor(children(config, state, pump), state, pump)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.request_stop())
    supervisor.run()
    lock.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
