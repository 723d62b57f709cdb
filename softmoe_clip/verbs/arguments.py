"""What several verbs ask for, in the same words."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="a run, a model folder, or open_clip's NAME:TAG, hf-hub:..., local-dir:...")]
Shards = Annotated[
    str, typer.Argument(help="a folder, a pattern such as 'shards/{00000..00099}.tar', URLs; several joined by ::")
]
Config = Annotated[str, typer.Argument(help="YAML file of a run; configs/demo.yaml and the like work from any folder")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings that win over the file's, as in optim.lr=0.0005")]

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU where there is one")]
Precision = Annotated[str, typer.Option(help="float32, bf16 or fp16")]
BatchSize = Annotated[int, typer.Option(help="pictures, or texts, at a time")]
Workers = Annotated[
    int | None, typer.Option(help="processes that decode pictures; 4 beside a GPU and 0 without, if not given")
]
Jobs = Annotated[int | None, typer.Option(help="processes that read; one per core if not given")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
