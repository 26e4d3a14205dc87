"""Several processes for one job, on one machine or on many.

Every process works with the devices of its own machine and takes its own share of the pictures, so processes have
nothing to wait for once they know who they are.
"""

from __future__ import annotations

import socket
import threading
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import jax


class Share(NamedTuple):
    """The part of a job that one of several processes does.

    process_index: which process it is, from 0. process_count: how many there are.
    """

    process_index: int = 0
    process_count: int = 1

    @property
    def tag(self) -> str:
        """What tells this process's files from those of the others; nothing for the first."""
        return f"-{self.process_index:04d}" if self.process_index else ""

    def failures(self, out: Path) -> Path:
        """Where this process says what it could not make."""
        return out / f"failed{self.tag}.jsonl"


ALONE = Share()

PATIENCE = 300.0
"""Seconds that processes wait for each other."""

NOTE_AFTER = 3.0
"""Seconds after which they say so."""


def initialize(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> Share:
    """Joins the other processes by `jax.distributed`. Call it before anything else of JAX.

    Without arguments the environment says it, as far as JAX knows it: SLURM, Open MPI, Kubernetes, a TPU pod. A process
    that died may be started again while the others continue; if it was process 0, the others end, and all are started
    again.

    coordinator: HOST:PORT of process 0.
    processes: how many there are.
    process: which one this is, from 0.

    Raises:
        ValueError: some of the three are missing or out of range, the environment says nothing, or process 0 cannot be
        reached for `PATIENCE` seconds.
    """
    given = (coordinator, processes, process)
    if any(value is None for value in given) and any(value is not None for value in given):
        raise ValueError("coordinator, num-processes and process-id belong together; give all three or none")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ValueError(f"process-id must be from 0 to {processes - 1}, found {process}")
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isdecimal() and int(port) < 2**16):
            raise ValueError(f"coordinator must be HOST:PORT of process 0, as 10.0.0.1:12345 is, found {coordinator!r}")
        if process:
            _wait_for(host.strip("[]"), int(port))
    jax.config.update("jax_enable_recoverability", True)
    note = threading.Timer(NOTE_AFTER, warnings.warn, [f"waiting for the other processes, at most {PATIENCE:.0f} s"])
    note.start()
    try:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=int(PATIENCE))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the processes could not be joined ({' '.join(str(error).split())})") from None
    finally:
        note.cancel()
    return Share(jax.process_index(), jax.process_count())


def _wait_for(host: str, port: int) -> None:
    """Waits until process 0 listens there; JAX would end this process without a word if that took too long."""
    start, noted = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host, port), timeout=NOTE_AFTER).close()
            return
        except OSError as error:
            waited, where = time.monotonic() - start, f"process 0 at {host}:{port} ({error})"
        if waited > PATIENCE:
            raise ValueError(f"the processes could not be joined: no answer from {where}; start it, or name its place")
        if waited > NOTE_AFTER and not noted:
            warnings.warn(f"waiting for {where}", stacklevel=3)
            noted = True
        time.sleep(0.2)
