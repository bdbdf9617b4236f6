"""Signals that request a stop."""

import os
import signal

from mae_et.runtime.signals import stop_signals


def test_sighup_requests_a_stop_except_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with stop_signals() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
        assert flag.signal == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with stop_signals() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
        assert flag.signal is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
