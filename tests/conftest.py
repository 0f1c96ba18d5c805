"""What every test process starts with."""

from __future__ import annotations

import gc
import os
import signal

import torch

# Triton reads it at its first import and never again; workers of xdist inherit it. Kernels are compiled in other
# processes (`kvpass.kernels.aot`), because an interpreted function cannot be.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# a shell starts background jobs with Ctrl-C ignored, and so would every process that the tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

# tracing makes very many objects that live on; Python would walk them again and again
gc.set_threshold(10_000, 10, 50)
