"""What every test starts from."""

from __future__ import annotations

import signal

# A job in the background starts with Ctrl-C ignored, one under nohup with a hangup, and both hand that on to their
# children; tests that send these signals need them.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
