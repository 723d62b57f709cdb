"""The command line: its verbs, and one line on stderr with exit status 2 for a mistake."""

import sys
from io import TextIOWrapper

import typer

from softmoe_clip.verbs import data, models, search, training

EXIT_MISTAKE = 2
MORE_MEMORY = (
    "Run fewer pairs at a time (train: set chunk_size, or grad_checkpointing=true; other verbs: a smaller --batch-size)"
)
# In the order of the help page.
VERBS = (
    training.demo,
    data.pack,
    data.check,
    data.stats,
    data.train_tokenizer,
    training.train,
    training.config,
    training.plot,
    search.eval,
    search.compare,
    search.embed,
    search.index,
    search.search,
    models.summary,
    models.upcycle,
    models.soup,
    models.export_onnx,
)

app = typer.Typer(
    help="Image-text contrastive models with Soft MoE towers: train, evaluate, search.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in VERBS:
    app.command()(verb)


def main() -> None:
    """Run the command line; what a user got wrong becomes one line on stderr and exit status 2."""
    from typer.exceptions import TyperException

    # Names and captions hold letters that not every terminal's encoding has: work that is done must not end in that.
    if isinstance(sys.stdout, TextIOWrapper):  # a notebook's has no encoding of its own
        sys.stdout.reconfigure(errors="backslashreplace")
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        status = app(standalone_mode=False)
    except typer.Abort:
        status = 130
    except (TyperException, ValueError, OSError) as error:
        status = fail(error.format_message() if isinstance(error, TyperException) else str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which `--help` does not wait for
            raise
        status = fail(f"{'. '.join(str(error).split('. ')[:3])}. {MORE_MEMORY}")
    sys.exit(status)


def fail(message: str) -> int:
    """Print a mistake as one line and return its exit status."""
    print("softmoe-clip: " + " ".join(message.split()), file=sys.stderr)
    return EXIT_MISTAKE
