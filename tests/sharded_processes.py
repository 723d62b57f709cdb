"""Several gloo processes that share a model out: whole runs, and a look at what each of them holds."""

import json
import os
import socket
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from forked import FORKSERVER, start_verb


def places(num_processes: int) -> list[dict[str, str]]:
    """What a launcher tells each process of the others; nothing where there is only one."""
    if num_processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [together | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(num_processes)]
    return [{name: str(value) for name, value in place.items()} for place in ranks]


def run_verb(num_processes: int, folder: Path, *arguments: object, **limits: object) -> list[tuple[int, str]]:
    """Run `softmoe-clip ARGUMENTS` to the end in each process; return the exit statuses and what they said.

    `limits` are those of `start_verb`, for the last process.
    """
    files = [folder / f"{rank}.txt" for rank in range(num_processes)]
    started = []
    for file, place in zip(files, places(num_processes), strict=True):
        of_this = limits if len(started) == num_processes - 1 else {}
        started.append(start_verb(arguments, folder, file, place, **of_this))
    return ended(started, files)


def look(num_processes: int, folder: Path, function: str, *arguments: object) -> list[dict]:
    """Run one of the functions below in each process and return what each returned."""
    files = [folder / f"look_{rank}.txt" for rank in range(num_processes)]
    started = []
    for file, place in zip(files, places(num_processes), strict=True):
        started.append(FORKSERVER.Process(target=_look, args=(function, arguments, file, place)))
        started[-1].start()
    found = ended(started, files)
    assert [status for status, _ in found] == [0] * num_processes, found
    return [json.loads(text.splitlines()[-1]) for _, text in found]


def ended(processes: list, files: list[Path]) -> list[tuple[int, str]]:
    """Wait for processes, not for ever."""
    for process in processes:
        process.join(120)
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    texts = [file.read_text() for file in files]
    assert not alive, texts
    return [(process.exitcode, text) for process, text in zip(processes, texts, strict=True)]


def _look(function: str, arguments: tuple, file: Path, place: dict[str, str]) -> None:
    import torch

    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(place)
    torch.set_num_threads(1)
    print(json.dumps(globals()[function](*arguments)), flush=True)


def shares(config_file: str, *overrides: str) -> dict:
    """Build a run's model, share it out, and say what this process holds of it."""
    import torch.distributed as dist

    _, towers = sharded_towers(config_file, *overrides)
    from torch.distributed.tensor import DTensor, Shard

    held = {name: p for name, p in towers.named_parameters() if isinstance(p, DTensor)}
    return {
        "processes": dist.get_world_size(),
        "rank": dist.get_rank(),
        "local": {name: list(p.to_local().shape) for name, p in held.items()},
        "whole": {name: list(p.shape) for name, p in held.items()},
        "by_rows": all(p.placements == (Shard(0),) for p in held.values()),
        "scalars": [name for name, p in towers.named_parameters() if not isinstance(p, DTensor)],
    }


def optimizers(config_file: str, *names: str) -> dict:
    """Tell what each optimizer says to a model that is shared out."""
    from dataclasses import replace

    from softmoe_clip.training.optim import make_optimizer

    config, towers = sharded_towers(config_file)
    found = {}
    for name in names:
        try:
            make_optimizer(towers, replace(config.optim, name=name))
            found[name] = ""
        except ValueError as error:
            found[name] = str(error)
    return found


def plan(config_file: str, *overrides: str) -> dict:
    """Plan a run, and tell what this process prints."""
    from softmoe_clip.config import TrainConfig
    from softmoe_clip.data_pipelines.strict import load_strict
    from softmoe_clip.training.plan import print_plan

    with redirect_stdout(StringIO()) as said:
        print_plan(load_strict(TrainConfig, Path(config_file), overrides))
    return {"said": said.getvalue()}


def sharded_towers(config_file: str, *overrides: str):
    """Return a run's config and its model, shared out over the processes there are."""
    from softmoe_clip.config import TrainConfig
    from softmoe_clip.data_pipelines.strict import load_strict
    from softmoe_clip.training.build import build
    from softmoe_clip.training.distributed import make_accelerator
    from softmoe_clip.training.sharding import shard

    config = load_strict(TrainConfig, Path(config_file), ["sharding=full", *overrides])
    accelerator = make_accelerator(config.precision)
    towers = build(config).model
    shard(towers, config, accelerator.num_processes, accelerator.device)
    return config, towers


def compiled_run(config_file: str, *overrides: str) -> dict:
    """Train with compiled towers, by a backend that needs no compiler, and tell how often one was asked for."""
    from softmoe_clip.config import TrainConfig
    from softmoe_clip.data_pipelines.strict import load_strict
    from softmoe_clip.training import execution
    from softmoe_clip.training.loop import train

    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    execution.BACKEND = backend
    os.environ["SOFTMOE_CLIP_QUIET"] = "1"
    train(load_strict(TrainConfig, Path(config_file), ["compile=true", *overrides]))
    return {"graphs": len(graphs)}
