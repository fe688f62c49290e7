"""`saccade serve`: a model behind OpenAI's and Anthropic's APIs. Lines for people go to stderr.

Next: server/run.py, which it runs.
"""

import os
from contextlib import ExitStack
from typing import Annotated, Any

import typer

from saccade.cli.options import (
    ARITHMETIC,
    BATCH,
    DEFAULT_MODEL,
    DRAFTS,
    PLACE,
    RANKS,
    ModelOption,
    takes_model,
)
from saccade.cli.prompts import read_text
from saccade.cli.terminal import progress_bar, reports, say

KEY_VARIABLE = "SACCADE_API_KEY"


@reports(2)
@takes_model(*BATCH, *PLACE, *ARITHMETIC, *DRAFTS, "prefix_cache", *RANKS, speculate="auto")
def serve(
    *,
    model: ModelOption = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.")] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What clients call the model. Repeatable. Default: MODEL.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(metavar="FILE", help="A Jinja template of chats, in place of the model's own.")
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help=f"That requests must carry. Repeatable. Default: ${KEY_VARIABLE}, or none.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help='Web pages whose scripts may ask, or "*". Repeatable. Default: none.')
    ] = None,
    ignore_field: Annotated[
        list[str] | None, typer.Option(help="A field of requests to drop, like messages.id. Repeatable.")
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; beyond them, 429.")] = 256,
    max_body: Annotated[int, typer.Option(help="Bytes of a request's body.")] = 1 << 24,
    grace: Annotated[float, typer.Option(help="Seconds for running answers to finish after TERM.")] = 30.0,
    how: dict[str, Any],
) -> None:
    """Answer over HTTP: /v1/completions, /v1/chat/completions, /v1/messages, /v1/responses. TERM or Ctrl-C ends it."""
    from saccade.server.engine.start import StartRefused
    from saccade.server.run import run_server
    from saccade.server.settings import ServeSettings

    keys = api_key or ([os.environ[KEY_VARIABLE]] if KEY_VARIABLE in os.environ else [])
    settings = ServeSettings(
        host=host,
        port=port,
        names=tuple(served_model_name or ()),
        chat_template=None if chat_template is None else read_text(chat_template, "--chat-template"),
        api_keys=tuple(keys),
        origins=tuple(allow_origin or ()),
        ignored_fields=tuple(ignore_field or ()),
        max_queue=max_queue,
        max_body=max_body,
        grace=grace,
    )
    with ExitStack() as stack:
        bars: dict[str, Any] = {}

        def watch(verb: str, done: int, total: int) -> None:
            if verb not in bars:
                stack.close()  # the bar before
                bars[verb] = stack.enter_context(progress_bar(verb))
            bars[verb](done, total)
            if done == total:
                stack.close()

        try:
            code = run_server({"path": model or None, **how}, settings, say, watch)
        except StartRefused as error:  # with the exit code of whatever refused the model in the other process
            say(f"saccade: {error}")
            code = error.code
    if code:
        raise typer.Exit(code)
