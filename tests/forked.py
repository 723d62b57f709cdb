"""Start runs by forking one process that has imported everything: a start then costs no imports."""

import atexit
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import get_context, set_start_method
from pathlib import Path

FORKSERVER = get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["torch", "open_clip", "accelerate", "softmoe_clip.cli", "softmoe_clip.training.loop"]
)
# What changes files; a process is about to do it when Python tells of it.
FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def start_verb(
    arguments: Sequence[str], folder: Path, told: Path, environment: Mapping[str, str] = {}, **limits
) -> FORKSERVER.Process:
    """Run `softmoe-clip ARGUMENTS` in a session of its own, one thread, stderr into a file; `limits` as in `_run`."""
    process = FORKSERVER.Process(target=_run, args=(list(map(str, arguments)), folder, told, dict(environment), limits))
    process.start()
    return process


def _run(arguments: list[str], folder: Path, told: Path, environment: dict[str, str], limits: dict) -> None:
    import torch

    from softmoe_clip.cli import main
    from softmoe_clip.launch import CPU_MEMORY

    set_start_method("fork", force=True)  # else the loader's workers would be started by a second server of their own
    os.setsid()
    os.chdir(folder)
    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    # What the environment sets, `train` leaves alone: the fork server's children keep the allocator that they have.
    os.environ.update({"OMP_NUM_THREADS": "1", "SOFTMOE_CLIP_QUIET": "1", **CPU_MEMORY, **environment})
    torch.set_num_threads(1)
    sys.argv = ["softmoe-clip", *arguments]
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    set_limits(**limits)
    status = 1
    try:
        main()
    except SystemExit as exit:
        status = exit.code or 0
    finally:
        atexit._run_exitfuncs()  # which a process of multiprocessing leaves out
        sys.stderr.flush()
        os._exit(status)


def set_limits(largest_file: int | None = None, dies_at: tuple[str, int] | None = None) -> None:
    """Let no file grow beyond some bytes; die of kill -9 just before the n-th operation on files below a folder."""
    if largest_file is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    if dies_at is not None:
        (below, left), this = dies_at, os.getpid()

        def count(event: str, arguments: tuple) -> None:
            nonlocal left
            if event in FILE_OPERATIONS and os.getpid() == this and str(arguments[0]).startswith(below):
                left -= 1
                if left == 0:
                    os.kill(this, signal.SIGKILL)

        sys.addaudithook(count)
