"""Worker processes of a command of many runs, with one progress bar."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from vision_peft.errors import UserError

if TYPE_CHECKING:
    from vision_peft.commands.trial_store import TrialStore


def run_workers(command: str, argv: list[str], jobs: int, store: TrialStore) -> None:
    """`jobs` processes of `vision-peft command argv --worker`, which share the machine's threads and take its GPUs in turn.

    Progress is read from the store, so that other machines' trials show too.

    Raises:
        UserError: interrupted, or a worker ended early.
    """
    from tqdm.auto import tqdm

    program = [sys.executable, "-m", "vision_peft.cli", command, *argv, "--worker"]
    workers = [subprocess.Popen(program, env=_environment(number, jobs)) for number in range(jobs)]
    try:
        with tqdm(total=store.size(), desc="trials", unit="trial", dynamic_ncols=True) as bar:
            while any(worker.poll() is None for worker in workers):
                bar.update(store.finished() - bar.n)
                bar.set_postfix_str(store.running())
                time.sleep(2)
            bar.update(store.finished() - bar.n)
    except KeyboardInterrupt:
        for worker in workers:
            worker.terminate()
        raise UserError(f"interrupted after {store.finished()} of {store.size()} trials; the same command goes on from here") from None
    if any(worker.returncode for worker in workers):
        raise UserError("a worker ended early (see above); the same command goes on from here")


def _environment(number: int, jobs: int) -> dict[str, str]:
    import torch

    own = dict(os.environ)
    threads = max(1, len(os.sched_getaffinity(0)) // jobs) if hasattr(os, "sched_getaffinity") else 1
    own.setdefault("OMP_NUM_THREADS", str(threads))
    if jobs > 1 and torch.cuda.device_count() > 1 and "CUDA_VISIBLE_DEVICES" not in own:
        own["CUDA_VISIBLE_DEVICES"] = str(number % torch.cuda.device_count())
    return own
