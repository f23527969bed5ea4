"""Build a server from a checkpoint."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zebra.errors import missing_package
from zebra.evaluate.target import EvalTarget
from zebra.model.families import layer_kinds
from zebra.serve.answering import Answerer
from zebra.serve.app import PAGE, build_app
from zebra.serve.engine import Engine
from zebra.serve.jobs import Prompts
from zebra.serve.metrics import Metrics
from zebra.serve.server import Server, bound_socket, config
from zebra.serve.settings import ServeSettings
from zebra.stripes import layer_letters


def make_server(
    checkpoint: str | os.PathLike[str],
    settings: ServeSettings,
    *,
    on_start: Callable[[str, bool], None] = lambda address, page: None,
    **loading: Any,
) -> Server:
    """Load a checkpoint and return a server for it; call its `run`, which serves until a signal ends it.

    Args:
        on_start: called when the server listens, with its URL and whether the chat page is served.
        loading: the fields of `zebra.model.load_options.LoadOptions`.

    Raises:
        ZebraError: as `EvalTarget`; a port in use, or an address of another machine; the page without gradio installed.
    """
    with_page = _serves_page(settings)
    with ExitStack() as on_error:
        listener = on_error.enter_context(closing(bound_socket(settings.host, settings.port)))
        target = EvalTarget(checkpoint, purpose="serving", **loading)
        model, metrics = target.load(), Metrics()
        prompts = Prompts(
            Path(os.path.abspath(checkpoint)).name,
            model,
            target.tokenizer,
            layout=target.columns(model)["layout"],
            max_tokens=settings.max_tokens,
        )
        answerer = Answerer(model, copy.deepcopy(target.tokenizer), settings.cache_memory, metrics)
        engine = Engine(answerer, metrics, max_queue=settings.max_queue, max_seconds=settings.max_seconds)
        app = build_app(prompts, engine, metrics, settings)
        if with_page:
            from zebra.serve.page import add_page

            layers = layer_letters(layer_kinds(model.config))
            app = add_page(
                app, PAGE, address=lambda: server.address, card=prompts.card(), layers=layers, settings=settings
            )
        server = Server(config(app, settings), listener, engine, lambda address: on_start(address, with_page))
        on_error.pop_all()  # from here on the server closes the socket
        return server


def _serves_page(settings: ServeSettings) -> bool:
    installed = find_spec("gradio") is not None
    if settings.page and not installed:
        raise missing_package("the chat page", "gradio", "page")
    return installed and (settings.on_loopback if settings.page is None else settings.page)
