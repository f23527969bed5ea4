"""`zebra serve` in its own process, by OpenAI's client and by raw sockets."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from conftest import STORIES, refused, run_zebra
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoTokenizer

import zebra
from zebra.cli.serve import _say
from zebra.errors import ZebraError
from zebra.serve.settings import ServeSettings

openai = pytest.importorskip("openai", reason="the extra serve is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

ONCE = "Once upon a time, there was a little girl"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
)
KEY = "a-token"
IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


class Served:
    """A server in a thread of this process."""

    def __init__(self, checkpoint: Path, key: str | None = None, **settings: Any) -> None:
        from zebra.serve.start import make_server

        self.key, listens = key, threading.Event()

        def on_start(address: str, page: bool) -> None:
            self.address = address
            listens.set()

        every = ServeSettings(port=0, api_key=key, **{"page": False} | settings)
        self.server = make_server(checkpoint, every, on_start=on_start)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        assert listens.wait(60)
        self.port = int(self.address.rpartition(":")[2])

    def client(self, **options: Any) -> Any:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=self.key or "none", max_retries=0, **options)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
        """Status, JSON and headers."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {self.key}"} | headers
        return self._open(Request(self.address + path, data, headers))

    def get(self, path: str, **headers: str) -> tuple[int, Any, Any]:
        return self._open(Request(self.address + path, headers={"authorization": f"Bearer {self.key}"} | headers))

    def _open(self, request: Request) -> tuple[int, Any, Any]:
        try:
            answer = urlopen(request, timeout=60)
        except HTTPError as error:
            answer = error
        with closing(answer):
            text = answer.read()
            is_json = answer.headers.get_content_type() == "application/json"
            return answer.status, json.loads(text) if is_json else text.decode(), answer.headers

    def metric(self, name: str) -> float:
        lines = [line.split() for line in self.get("/metrics")[1].splitlines() if not line.startswith("#")]
        return sum(float(line[-1]) for line in lines if line[0] == name or line[0].startswith(name + "{"))

    def requests(self) -> float:
        """Number of running and waiting requests."""
        return self.metric("zebra_requests_running") + self.metric("zebra_requests_waiting")

    def until_idle(self) -> None:
        until(lambda: self.requests() == 0)

    def raw(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(data)
        return connection

    def raw_post(self, path: str, body: Any) -> socket.socket:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n"
        return self.raw(head.encode() + b"content-type: application/json\r\n\r\n" + data)

    def end(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)
        self.thread.join(30)
        assert not self.thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def with_template(checkpoint: Path, folder: Path, template: str = TEMPLATE) -> Path:
    """A striped checkpoint with a chat template, whose answers end at their length alone."""
    zebra.convert(checkpoint, folder, "GLLL:64")
    generation = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": 0}
    (folder / "generation_config.json").unlink()  # it may be a link to the source's
    (folder / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bypass the proxy that lm-eval's tests set, which does not exist."""
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(STORIES, tmp_path_factory.mktemp("served") / "stories")


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[Served]:
    server = Served(checkpoint, max_body=100_000, max_queue=12)
    yield server
    server.end()


@pytest.fixture(scope="module")
def guarded(checkpoint: Path) -> Iterator[Served]:
    server = Served(checkpoint, KEY)
    yield server
    server.end()


def user(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def calling(arguments: str) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]}


def expected(checkpoint: Path, prompt: str, new_tokens: int) -> str:
    return zebra.generate(checkpoint, prompt, max_new_tokens=new_tokens).text


# Answers


def test_without_gradio_the_command_says_why_there_is_no_page(capsys: pytest.CaptureFixture[str]) -> None:
    note = "no chat page, as gradio is not installed (the extra page)"
    _say(ServeSettings(), "http://127.0.0.1:1", False)
    assert note in " ".join(capsys.readouterr().err.split())
    _say(ServeSettings(page=False), "http://127.0.0.1:1", False)
    _say(ServeSettings(host="0.0.0.0", api_key="key"), "http://0.0.0.0:1", False)
    assert "gradio" not in capsys.readouterr().err


def test_a_chat_is_what_generate_says_whole_and_streamed(served: Served, checkpoint: Path) -> None:
    client, text = served.client(), expected(checkpoint, ONCE + "\n", 30)
    options: Any = {"model": "stories", "messages": user(ONCE), "max_tokens": 30}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == "length"
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert len([chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]) > 10
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 30
    assert chunks[-1].timings["predicted_n"] == 30


def test_the_next_turn_reads_only_what_is_new(served: Served, checkpoint: Path) -> None:
    client = served.client()
    turn = [{"role": "user", "content": "One day Tim went to the park. " * 5}]
    first = client.chat.completions.create(model="stories", messages=turn, max_tokens=40)
    turn += [{"role": "assistant", "content": first.choices[0].message.content}, *user("Then he")]
    second = client.chat.completions.create(model="stories", messages=turn, max_tokens=20)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens <= cached < second.usage.prompt_tokens
    assert second.timings["prompt_n"] == second.usage.prompt_tokens - cached
    prompt = "".join(message["content"] + ("</s>\n", "\n")[message["role"] == "user"] for message in turn)
    assert second.choices[0].message.content == expected(checkpoint, prompt, 20)


def test_a_stream_says_how_far_the_prompt_is_read_where_it_is_asked(served: Served) -> None:
    """As llama.cpp's server does; what a cache holds counts as read."""
    client, messages = served.client(), user("Lily had a red ball. " * 12 + "The end.")
    options: Any = {"model": "stories", "messages": messages, "max_tokens": 3, "stream": True}
    options |= {"stream_options": {"include_usage": True}}
    for is_cached in (False, True):
        chunks = list(client.chat.completions.create(**options, extra_body={"return_progress": True}))
        steps = [chunk.prompt_progress for chunk in chunks if hasattr(chunk, "prompt_progress")]
        usage = chunks[-1].usage
        cached = usage.prompt_tokens_details.cached_tokens
        assert {(step["total"], step["cache"]) for step in steps} == {(usage.prompt_tokens, cached)}
        assert (cached > usage.prompt_tokens // 2) == is_cached  # another text may begin alike
        read = [step["processed"] for step in steps]
        assert read == sorted(read)
        assert (read[0], read[-1]) == (cached, usage.prompt_tokens)
        assert is_cached or len({*read}) > 2
        assert all(step["time_ms"] >= 0 for step in steps)
    assert not any(hasattr(chunk, "prompt_progress") for chunk in client.chat.completions.create(**options))
    prompt: Any = {"model": "stories", "prompt": ONCE, "max_tokens": 2, "stream": True}
    chunks = list(client.completions.create(**prompt, extra_body={"return_progress": True}))
    assert chunks[0].prompt_progress["total"] > 0


def test_completions_and_responses_say_the_same(served: Served, checkpoint: Path) -> None:
    client, text = served.client(), expected(checkpoint, ONCE, 12)
    assert client.completions.create(model="stories", prompt=ONCE, max_tokens=12).choices[0].text == text
    chunks = client.completions.create(model="stories", prompt=ONCE, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    answer = expected(checkpoint, ONCE + "\n", 12)
    response = client.responses.create(model="stories", input=ONCE, max_output_tokens=12)
    assert response.output_text == answer
    assert response.status == "incomplete"
    assert response.usage.output_tokens == 12
    events = list(client.responses.create(model="stories", input=user(ONCE), max_output_tokens=12, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == answer
    assert [events[0].type, events[-1].type] == ["response.created", "response.incomplete"]


def test_a_stop_string_ends_and_is_left_out(served: Served, checkpoint: Path) -> None:
    text = expected(checkpoint, ONCE + "\n", 40)
    stop = text[20:26]
    options: Any = {"model": "stories", "messages": user(ONCE), "max_tokens": 40, "stop": ["not in it", stop]}
    whole = served.client().chat.completions.create(**options)
    assert whole.choices[0].message.content == text[: text.index(stop)]
    assert whole.choices[0].finish_reason == "stop"
    chunks = served.client().chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text[: text.index(stop)]


def test_a_seed_repeats_and_another_differs(served: Served) -> None:
    def drawn(seed: int | None) -> str:
        answer = served.client().chat.completions.create(
            model="stories", messages=user(ONCE), max_tokens=30, temperature=1.2, top_p=0.95, seed=seed
        )
        return str(answer.choices[0].message.content)

    assert drawn(1) == drawn(1) != drawn(2)
    assert len({drawn(None) for _ in range(3)}) > 1


def test_logprobs_are_the_models(served: Served, checkpoint: Path) -> None:
    answer = served.client().chat.completions.create(
        model="stories", messages=user(ONCE), max_tokens=5, logprobs=True, top_logprobs=3
    )
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), zebra.load(checkpoint)
    ids = tokenizer(ONCE + "\n", return_tensors="pt")["input_ids"]
    for scored in answer.choices[0].logprobs.content:
        with torch.no_grad():
            logprobs = model(ids).logits[0, -1].log_softmax(-1)
        top = logprobs.topk(3)
        assert scored.logprob == pytest.approx(float(top.values[0]), abs=1e-4)
        assert [one.logprob for one in scored.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-4)
        whole = tokenizer.decode(torch.cat([ids[0], top.indices[:1]]))
        assert scored.token == whole[len(tokenizer.decode(ids[0])) :]
        ids = torch.cat([ids, top.indices[None, :1]], 1)
    assert "".join(scored.token for scored in answer.choices[0].logprobs.content) == answer.choices[0].message.content
    legacy = served.client().completions.create(model="stories", prompt=ONCE + "\n", max_tokens=5, logprobs=2)
    assert legacy.choices[0].logprobs.token_logprobs == pytest.approx(
        [one.logprob for one in answer.choices[0].logprobs.content], abs=1e-4
    )


@pytest.mark.parametrize("tokenizer", ["stories", "byte-level"])
def test_bytes_of_tokens_are_those_of_the_text(tokenizer: str) -> None:
    """Also where a character is several tokens, by byte fallback (sentencepiece) and by GPT-2's alphabet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from zebra.serve.scores import scored_token

    if tokenizer == "stories":
        one: Any = AutoTokenizer.from_pretrained(STORIES)
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        bare = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
        bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        one = PreTrainedTokenizerFast(tokenizer_object=bare)
    text = "The naïve 🐈 said: 日本 \n"
    tokens = [scored_token(one, token, -1.0) for token in one(" " + text, add_special_tokens=False)["input_ids"]]
    assert b"".join(token.bytes or b"?" for token in tokens).decode().strip() == text.strip()
    assert {token.text for token in tokens if len(token.bytes or b"") == 1} >= {"\ufffd"}


def test_parallel_answers_equal_single_ones(served: Served) -> None:
    client = served.client()

    def text(i: int) -> str:
        stream = client.chat.completions.create(
            model="stories", messages=user(f"{ONCE} {i}"), max_tokens=15, stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    single = [text(i) for i in range(4)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(text, [*range(4), *range(4)])) == single * 2


# Clients that leave, and limits


@pytest.fixture
def slow_model() -> Iterator[None]:
    """A token takes 0.1 s at least: 400 tokens end within no test's wait, unless they are cancelled."""
    hook = register_module_forward_pre_hook(lambda module, args: time.sleep(0.002))
    yield
    hook.remove()


@pytest.mark.usefixtures("slow_model")
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_model(served: Served, stream: bool) -> None:
    body = {"messages": user(ONCE), "max_tokens": 450, "stream": stream}
    before, left = served.metric("zebra_answers_total"), served.metric('zebra_answers_total{finish="cancelled"}')
    connection = served.raw_post("/v1/chat/completions", body)
    if stream:
        connection.recv(2000)
    until(lambda: served.metric("zebra_requests_running") == 1)
    connection.close()
    served.until_idle()
    assert served.metric("zebra_answers_total") == before + 1
    assert served.metric('zebra_answers_total{finish="cancelled"}') == left + 1


@pytest.mark.usefixtures("slow_model")
def test_a_full_queue_says_when_to_come_again(served: Served) -> None:
    body = {"prompt": ONCE, "max_tokens": 400, "stream": True, "temperature": 1, "seed": 3}
    open_ones = [served.raw_post("/v1/completions", body) for _ in range(13)]
    until(lambda: served.metric("zebra_requests_waiting") == 12)
    status, error, headers = served.post("/v1/completions", {"prompt": ONCE})
    assert (status, error["error"]["code"]) == (429, "queue_full")
    assert int(headers["retry-after"]) > 0
    for connection in open_ones:
        connection.close()
    served.until_idle()


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/chat/completions", b"{", 400, ["the body is not JSON: "]),
        ("/v1/chat/completions", b"[]", 400, []),
        ("/v1/chat/completions", b"\xff\xfe", 400, []),
        ("/v1/chat/completions", {}, 400, ["messages"]),
        ("/v1/chat/completions", {"messages": []}, 400, ["messages"]),
        ("/v1/chat/completions", {"messages": "hello"}, 400, ["messages"]),
        ("/v1/chat/completions", {"messages": [{"role": "king", "content": "x"}]}, 400, ["messages.0.role"]),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, ["content"]),
        ("/v1/chat/completions", {"messages": user("x"), "n": 2}, 400, ["n:", "'2'"]),
        ("/v1/chat/completions", {"messages": user("x"), "nothing": 2}, 400, ["nothing"]),
        ("/v1/chat/completions", {"messages": user("x"), "temperature": -1}, 400, ["temperature"]),
        ("/v1/completions", {"prompt": "x", "temperature": 1e-40}, 400, ["temperature", "1e-40"]),
        ("/v1/chat/completions", {"messages": user("x"), "max_tokens": 0}, 400, ["max_tokens", "'0'"]),
        ("/v1/chat/completions", {"messages": user("x"), "top_logprobs": 3}, 400, ["logprobs"]),
        ("/v1/chat/completions", {"messages": user("x"), "stop": [""]}, 400, ["stop"]),
        ("/v1/chat/completions", {"messages": user("x"), "model": "gpt-4"}, 404, ["stories", "gpt-4"]),
        ("/v1/chat/completions", {"messages": user("x " * 200_000)}, 413, ["100,000", "--max-body"]),
        ("/v1/chat/completions", {"messages": user("x"), "response_format": {"type": "json_object"}}, 400, ["json_ob"]),
        ("/v1/chat/completions", {"messages": user("x"), "tools": [TOOL]}, 400, ["tools", "stories"]),
        ("/v1/responses", {"input": "x", "tools": [{"type": "function", **TOOL["function"]}]}, 400, ["tools"]),
        ("/v1/chat/completions", {"messages": user("x"), "chat_template_kwargs": {"tokenize": 0}}, 400, ["tokenize"]),
        ("/v1/chat/completions", {"messages": user("x"), "chat_template_kwargs": {"messages": 0}}, 400, ["messages"]),
        ("/v1/chat/completions", {"messages": user("x"), "chat_template_kwargs": {"remedy": 0}}, 400, ["remedy"]),
        ("/v1/chat/completions", {"messages": [*user("x"), calling('"abc"')]}, 400, ["messages.1", "a JSON object"]),
        ("/v1/chat/completions", {"messages": [*user("x"), calling("[" * 50_000)]}, 400, ["a JSON object"]),
        ("/v1/chat/completions", {"messages": user("x"), "generation_config": "[" * 50_000}, 400, ["a JSON object"]),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [IMAGE]}]}, 400, ["image_url"]),
        ("/v1/chat/completions", {"messages": user("\ud83d")}, 400, ["surrogate"]),
        ("/v1/completions", {"prompt": "\ud83d"}, 400, ["surrogate"]),
        ("/v1/completions", {"prompt": ["a", "b"]}, 400, ["prompt"]),
        ("/v1/completions", {"prompt": [1, 70_000]}, 400, ["prompt"]),
        ("/v1/responses", {"input": [{"type": "nonsense"}]}, 400, ["input", "neither a message nor a tool call"]),
        ("/v1/responses", {"input": [{"role": "user", "content": "x"}, 5]}, 400, ["input: item 1 must be an object"]),
        ("/v1/responses", {"input": [{"role": "user"}]}, 400, ["input: item 0: a message must have content"]),
        ("/v1/responses", {"input": [{"role": "user", "content": 5}]}, 400, ["input: item 0.content: "]),
        ("/v1/responses", {"input": [{"role": "x", "content": "y"}]}, 400, ["input: item 0.role: "]),
        (
            "/v1/responses",
            {"input": [{"role": "system", "content": "y"}, *user("x")], "instructions": "z"},
            400,
            ["instructions cannot be combined with"],
        ),
        ("/v1/responses", {"input": 3}, 400, ["input"]),
        ("/v1/nothing", {}, 404, []),
        ("/v1/../../etc/passwd", {}, 404, []),
        ("//v1/chat/completions", {"messages": user("x")}, 404, []),
    ],
)
def test_bad_input_is_one_clear_error(served: Served, path: str, body: Any, status: int, words: list[str]) -> None:
    got, error, _ = served.post(path, body)
    assert got == status
    assert set(error["error"]) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["error"]["message"]


@pytest.mark.parametrize(
    ("path", "field", "prompt"),
    [
        ("/v1/chat/completions", "messages", user("x " * 2000)),
        ("/v1/completions", "prompt", "x " * 2000),
        ("/v1/responses", "input", "x " * 2000),
    ],
)
def test_a_prompt_that_is_too_long_is_named_by_its_field(served: Served, path: str, field: str, prompt: Any) -> None:
    status, error, _ = served.post(path, {field: prompt})
    assert (status, error["error"]["code"], error["error"]["param"]) == (400, "context_length_exceeded", field)
    assert "512" in error["error"]["message"]


def test_a_prompt_is_decoded_where_it_is_encoded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser of an answer decodes its prompt: not in the event loop, as a tokenizer serves one thread at a time."""
    threads: list[threading.Thread] = []
    monkeypatch.setattr(
        "zebra.serve.jobs.build_response_parser", lambda *_, **__: threads.append(threading.current_thread())
    )
    assert served.post("/v1/chat/completions", {"messages": user(ONCE), "max_tokens": 1})[0] == 200
    assert served.post("/v1/responses", {"input": ONCE, "max_output_tokens": 1})[0] == 200
    assert len(threads) == 2
    assert served.thread not in threads


def test_fields_that_ask_for_nothing_are_taken(served: Served) -> None:
    body = {"messages": user(ONCE), "max_tokens": 2, "n": 1, "user": "me", "presence_penalty": 0, "logit_bias": {}}
    assert served.post("/v1/chat/completions", body | {"tools": [], "seed": None, "top_p": 1})[0] == 200


def test_models_and_metrics_are_listed(served: Served) -> None:
    card = served.get("/v1/models")[1]["data"][0]
    assert (card["id"], card["layout"], card["max_model_len"]) == ("stories", "GLLL:64", 512)
    assert served.get("/v1/models/stories")[1] == card
    assert served.get("/v1/models/other")[0] == 404
    assert served.get("/health")[:2] == (200, {"status": "ok"})
    assert served.post("/load_model", {"model": "stories"})[1].startswith('data: {"status": "ready"')
    assert served.metric("zebra_prompt_tokens_total") > 0
    assert served.get("/metrics")[2]["content-type"].startswith("text/plain")


def test_other_sites_and_other_bodies_are_rejected(served: Served) -> None:
    """A page of another site can send text without a preflight, or a name of its own that leads to this machine."""
    assert served.post("/v1/completions", {"prompt": "x"}, **{"content-type": "text/plain"})[0] == 415
    assert served.get("/v1/models", host="attacker.example")[0] == 403
    assert served.get("/v1/models", host=f"LOCALHOST:{served.port}")[0] == 200
    assert served.get("/v1/models", origin="http://[")[0] == 403
    assert served.get("/v1/models", origin="http://attacker.example")[0] == 403
    assert served.get("/v1/models", origin=served.address)[0] == 200


def test_the_token_opens_and_another_does_not(guarded: Served) -> None:
    assert guarded.client().models.list().data[0].id == "stories"
    for header in ("", "Bearer", "Bearer a-toke", "Bearer a-token-", "Basic a-token", "Bearer \xe4"):
        status, error, headers = guarded.get("/v1/models", authorization=header)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert KEY not in error["error"]["message"]
    assert guarded.post("/v1/completions", {"prompt": "x"}, authorization="Bearer no")[0] == 401
    assert guarded.get("/metrics", authorization="")[0] == 401
    assert guarded.get("/health", authorization="")[0] == 200
    assert guarded.get("//v1/models", authorization="")[0] == 401
    assert guarded.get("/v1/models", host="behind-a-proxy.example")[0] == 200


def test_nothing_of_the_page_is_open_or_unbounded(served: Served, guarded: Served) -> None:
    """gradio would read bodies of any size before a login of its own. Here without gradio: what passes gets 404."""

    def page(password: str, **headers: str) -> tuple[int, Any, Any]:
        basic = f"Basic {b64encode(f'me:{password}'.encode()).decode()}"
        return guarded.get("/page/config", **{"authorization": basic} | headers)

    for path in ("/page", "/page/", "/page/login", "/page/gradio_api/queue/join"):
        status, _, headers = guarded.post(path, {}, authorization="")
        assert (status, headers["www-authenticate"].split()[0]) == (401, "Basic")
    assert [page(password)[0] for password in ("", "a-toke", "\xe4", KEY)] == [401, 401, 401, 404]
    assert page("", authorization="Basic x")[0] == 401
    assert page(KEY, origin="http://attacker.example")[0] == 403
    assert page(KEY, origin="https://proxy.example", **{"x-forwarded-host": "proxy.example"})[0] == 404
    assert guarded.get("/v1/models", authorization=f"Basic {b64encode(f'me:{KEY}'.encode()).decode()}")[0] == 401
    assert served.post("/page/gradio_api/upload", b"x" * 200_000)[0] == 413


# The connection


def answer_of(connection: socket.socket, seconds: float) -> bytes:
    connection.settimeout(seconds)
    with connection:
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


def test_broken_and_half_closed_requests_leave_the_server_well(served: Served) -> None:
    for data in (b"\x16\x03\x01\x00", b"POST /v1/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n"):
        assert b"400" in answer_of(served.raw(data), 10)[:20]
    connection = served.raw(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{")
    connection.shutdown(socket.SHUT_WR)
    answer_of(connection, 10)
    huge = served.raw(b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 100_000)
    assert b"400" in answer_of(huge, 10)[:20]
    assert served.get("/health")[0] == 200


def test_a_slow_client_is_cut_off(checkpoint: Path) -> None:
    server = Served(checkpoint, read_seconds=1.0)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    slow_head, slow_body = server.raw(head), server.raw(head + b"content-length: 50\r\n\r\n{")
    second = server.raw(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    received = b""
    while b"ok" not in received:
        received += second.recv(1000)
    second.sendall(b"GET /hea")
    assert answer_of(slow_head, 10) == b""
    assert b"408" in answer_of(slow_body, 10)[:20]
    assert answer_of(second, 10) == b""
    server.end()


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_takes_too_long_ends(checkpoint: Path, stream: bool) -> None:
    server = Served(checkpoint, max_seconds=0.2)
    body = {"prompt": ONCE, "max_tokens": 500, "temperature": 1, "seed": 5, "stream": stream}
    status, answer, _ = server.post("/v1/completions", body)
    assert status == (200 if stream else 504)
    assert "--timeout" in (answer.splitlines()[-2] if stream else answer["error"]["message"])
    server.until_idle()
    server.end()


def status_of(url: str) -> int:
    try:
        with urlopen(url) as answer:
            return answer.status
    except HTTPError as error:
        with error:
            return error.code


def test_sigterm_lets_running_requests_end_and_takes_no_more(checkpoint: Path) -> None:
    """The command in its own process."""
    command = [sys.executable, "-m", "zebra", "serve", str(checkpoint), "--port", "0", "--no-page"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    address = process.stderr.readline().partition("API ")[2].split("/v1")[0]
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    stream = iter(
        client.chat.completions.create(
            model="stories", messages=user(ONCE), max_tokens=400, stream=True, temperature=1, seed=5
        )
    )
    next(stream)
    process.send_signal(signal.SIGTERM)
    until(lambda: status_of(f"{address}/health") == 503)
    with pytest.raises(openai.InternalServerError) as stopping:
        client.completions.create(model="stories", prompt=ONCE, max_tokens=1)
    assert stopping.value.status_code == 503
    assert stopping.value.code == "stopping"
    assert stopping.value.response.headers["retry-after"]
    assert [*stream][-1].choices[0].finish_reason in ("stop", "length")
    assert process.wait(20) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.usefixtures("slow_model")
def test_a_second_signal_answers_running_requests_with_an_error(checkpoint: Path) -> None:
    """Ctrl-C twice: the request that runs, and one that waits."""
    server = Served(checkpoint)
    with ThreadPoolExecutor() as clients:
        body = {"prompt": ONCE, "max_tokens": 450}
        answers = [clients.submit(server.post, "/v1/completions", body) for _ in range(2)]
        until(lambda: server.requests() == 2)
        server.server.handle_exit(signal.SIGINT, None)
        server.server.handle_exit(signal.SIGINT, None)
        for answer in answers:
            status, error, headers = answer.result(20)
            assert (status, error["error"]["code"]) == (503, "stopping")
            assert headers["retry-after"]
    server.thread.join(30)
    assert not server.thread.is_alive()


# Settings


@pytest.mark.parametrize(("host", "says"), [("127.0.0.1", "in use"), ("192.0.2.1", "192.0.2.1"), ("a..b", "a..b")])
def test_an_address_that_cannot_be_had_is_known_before_the_checkpoint_is_read(host: str, says: str) -> None:
    from zebra.serve.start import make_server

    with socket.create_server(("127.0.0.1", 0)) as busy:
        settings = ServeSettings(host=host, port=busy.getsockname()[1], api_key=KEY, page=False)
        with pytest.raises(ZebraError, match=says):
            make_server("no checkpoint", settings)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--host", "0.0.0.0"), ("0.0.0.0", "token", "ZEBRA_API_KEY")),
        (("--host", "example.org"), ("token",)),
        (("--api-key", " x"), ("space",)),
        (("--cache-memory", "much"), ("much",)),
        (("--timeout", "0"), ("max_seconds",)),
        (("--timeout", "nan"), ("max_seconds",)),
    ],
)
def test_settings_that_cannot_be_are_one_line(options: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(run_zebra("serve", STORIES, *options), *words)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.9.9.9", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback_is_this_machine_alone(host: str, loopback: bool) -> None:
    assert ServeSettings(host=host, api_key="x").on_loopback == loopback
