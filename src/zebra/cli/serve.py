"""The command `serve`."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from typing import Annotated

import typer

from zebra.cli import options, show
from zebra.errors import missing_package
from zebra.model.checkpoint_files import check_checkpoint
from zebra.plan.fit import parse_bytes
from zebra.serve.settings import ServeSettings

_NEEDED = ("fastapi", "openai", "prometheus_client", "uvicorn")


def serve(
    checkpoint: options.Checkpoint,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than loopback, it needs a token.")
    ] = ServeSettings.host,
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="INT", help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="ZEBRA_API_KEY", help="Bearer token of the clients; safer in the environment. Default: none."
        ),
    ] = None,
    page: Annotated[
        bool | None,
        typer.Option("--page/--no-page", help="Serve the chat page. Default: on loopback, if gradio is installed."),
    ] = None,
    cache_memory: Annotated[
        str, typer.Option(help="Memory for the KV caches of conversations; the least recently used are dropped.")
    ] = "1GiB",
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="INT", help="Maximum tokens of an answer, if the request sets none.")
    ] = ServeSettings.max_tokens,
    max_queue: Annotated[
        int, typer.Option(min=1, metavar="INT", help="Maximum number of waiting requests; more get status 429.")
    ] = ServeSettings.max_queue,
    max_seconds: Annotated[
        float,
        typer.Option("--timeout", metavar="SECONDS", help="Limit of a request with its wait; then status 504."),
    ] = ServeSettings.max_seconds,
    max_body: Annotated[str, typer.Option(help="Maximum size of a request; larger ones get status 413.")] = "32MiB",
    stripes: options.StripesNotation = None,
    rope: options.RopeNotation = None,
    self_extend: options.SelfExtendNotation = None,
    window: options.Window = None,
    full_decode: options.FullDecode = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Serve a checkpoint with OpenAI's API and a chat page: one machine, one model, one request at a time."""
    arguments = options.call_arguments(locals(), "checkpoint")
    arguments |= {"cache_memory": parse_bytes(cache_memory), "max_body": parse_bytes(max_body)}
    of_settings = {field.name for field in fields(ServeSettings)} & arguments.keys()
    settings = ServeSettings(**{name: arguments.pop(name) for name in of_settings})
    check_checkpoint(checkpoint)
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise missing_package("serving", ", ".join(missing), "serve")
    with show.working():
        from zebra.serve.start import make_server

        make_server(checkpoint, settings, on_start=partial(_say, settings), **arguments).run()


def _say(settings: ServeSettings, address: str, page: bool) -> None:
    where = f"the chat page {address}/, the API {address}/v1" if page else f"the API {address}/v1"
    if not page and settings.page is None and settings.on_loopback:
        where += "; no chat page, as gradio is not installed (the extra page)"
    show.note(f"serving: {where}. Ctrl-C stops it after the running requests.")
