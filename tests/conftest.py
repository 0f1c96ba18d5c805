"""What every test process starts with."""

from __future__ import annotations

import signal

# a shell starts background jobs with Ctrl-C ignored, and so would every process that the tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
