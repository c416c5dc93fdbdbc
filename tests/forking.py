"""Processes that begin with the library imported, so that most of what they do is work."""

from __future__ import annotations

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["fastpeft.training", "fastpeft.cli", "fastpeft.comparison.run", "peft", "accelerate"])
