"""What every test starts from."""

from __future__ import annotations

import signal

# A job in the background starts with Ctrl-C ignored and hands that on to its children; tests that press it need it.
signal.signal(signal.SIGINT, signal.default_int_handler)
