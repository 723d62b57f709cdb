"""The verbs that train."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from softmoe_clip.verbs.arguments import Config, Overrides

EXIT_STOPPED = 75  # EX_TEMPFAIL: the run saved its state and goes on when started again


@contextmanager
def exit_when_stopped() -> Iterator[None]:
    """Give a run that was asked to stop, and has said so, an exit status of its own, the same in every process."""
    from softmoe_clip.training.run_folder import Stopped

    try:
        yield
    except Stopped:
        raise typer.Exit(EXIT_STOPPED) from None


def demo(
    data: Annotated[str | None, typer.Option(help="your own pictures, as for pack; drawn scenes if not given")] = None,
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("demo"),
):
    """Do everything once, from pictures to a report.

    Pack, train, eval, embed, index, search. Broken off, the same command continues.

    Example: softmoe-clip demo --data my_pictures --out demo
    """
    from softmoe_clip.launch import keep_cpu_memory

    keep_cpu_memory()
    from softmoe_clip.demo import demo

    with exit_when_stopped():
        demo(data, out)


def train(
    config: Config,
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="print parameters, memory and expected time, and stop")] = False,
):
    """Train a model, or go on exactly where its run stopped.

    Ctrl-C or SIGTERM, in any process of the run: its state is saved, and the exit status is 75. (`accelerate launch`
    and `torchrun` make of that a status of 1 and a traceback of their own; after a SIGTERM they leave the run 30
    seconds to save, or TORCH_ELASTIC_SHUTDOWN_TIMEOUT of them.)

    Example: softmoe-clip train configs/clip_softmoe_flickr8k.yaml out=runs/a steps=500
    """
    from softmoe_clip.config import TrainConfig, find_config
    from softmoe_clip.data_pipelines.strict import load_strict
    from softmoe_clip.launch import keep_cpu_memory

    settings = load_strict(TrainConfig, find_config(config), overrides or [])
    keep_cpu_memory()
    if plan:
        from softmoe_clip.training.plan import print_plan

        print_plan(settings)
        return
    from softmoe_clip.training.loop import train

    with exit_when_stopped():
        train(settings)


def config(config: Config, overrides: Overrides = None):
    """Print a config with all settings, defaults too.

    Example: softmoe-clip config configs/demo.yaml optim.lr=0.0005
    """
    from omegaconf import OmegaConf

    from softmoe_clip.config import TrainConfig, find_config
    from softmoe_clip.data_pipelines.strict import load_strict
    from softmoe_clip.training.run_folder import as_tree

    print(
        OmegaConf.to_yaml(OmegaConf.create(as_tree(load_strict(TrainConfig, find_config(config), overrides or [])))),
        end="",
    )


def plot(
    runs: Annotated[list[str], typer.Argument(help="run folders, or URLs of runs")],
    out: Annotated[Path, typer.Option(help="picture to write: .png, .svg or .pdf")] = Path("plot.png"),
    metric: Annotated[
        list[str] | None,
        typer.Option(help="a metric, or a pattern such as 'eval/*'; may be repeated; the usual ones if not given"),
    ] = None,
    x: Annotated[str, typer.Option(help="step, samples_seen or minutes")] = "step",
):
    """Draw several runs in one picture.

    Losses, metrics, learning rate, gradient norm, routing.

    Example: softmoe-clip plot runs/a runs/b --x minutes
    """
    from softmoe_clip.report.run_plots import plot

    print(plot(runs, out, metric or (), x))
