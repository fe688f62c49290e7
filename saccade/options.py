"""The arguments and options that several commands share, each with its one line of help. Next: cli.py."""

from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="Directory, .safetensors file or Hugging Face id. Default: the bundled checkpoint.")
]
Tp = Annotated[int, typer.Option("--tp", help="Ranks that share the model.")]
Ep = Annotated[int, typer.Option("--ep", help="Ranks that divide the experts; divides tp.")]
Rank = Annotated[int, typer.Option("--rank", help="Which rank's plan.")]
Mtp = Annotated[bool, typer.Option("--mtp/--no-mtp", help="With or without the multi-token prediction layer.")]
Dtype = Annotated[str, typer.Option("--dtype", help='"auto" (as stored, else BF16) or "float32".')]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
CacheTokens = Annotated[int | None, typer.Option("--cache-tokens", help="Tokens the cache holds. Default: what fits.")]
IndexCache = Annotated[
    str, typer.Option("--index-cache", help='How index keys are cached: "bf16" (F32 in "float32") or "fp8".')
]
Device = Annotated[str, typer.Option("--device", help='"auto", "cpu", "cuda" or "cuda:1".')]

BUNDLED = ""  # the default MODEL; a path would put this machine's directories into --help
