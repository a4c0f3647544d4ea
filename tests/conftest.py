"""What every test may rely on, whoever runs them."""

from __future__ import annotations

import signal

# A shell's background job inherits SIGINT ignored, one of nohup's SIGHUP, and so would all that is
# started here: a run heeds that, as it should, and would not end when a test asks it to.
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )
