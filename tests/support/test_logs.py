"""What a process of the command line says is this library's own."""

from __future__ import annotations

import os
import subprocess
import sys


def test_a_home_that_cannot_be_written_is_not_told_by_other_libraries() -> None:
    """As in a container: matplotlib would say it at the end of every run."""
    script = """
import logging
from fastpeft.support.logs import show_own_messages
show_own_messages(logging.StreamHandler(), False)
import matplotlib
matplotlib.get_cachedir()
"""
    home = dict.fromkeys(("HOME", "MPLCONFIGDIR"), os.devnull)
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, env={**os.environ, **home}, check=True)
    assert shown.stderr == b""
