"""fedtune serve, over real sockets and with OpenAI's own client: answers, limits, fairness, cancellation, adapters."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from export_helpers import MakeRun, export_adapter, export_run

from fedtune.client.inference.chat import converse
from fedtune.client.inference.exported_model import Adapter, ExportedModel, Sampling
from fedtune.client.inference.http_api import create_app
from fedtune.client.inference.inference_commands import pulled_model
from fedtune.client.inference.model_versions import Versions
from fedtune.client.inference.openai_bodies import event
from fedtune.client.inference.scheduler import Piece, Scheduler
from fedtune.core.errors import ExportError, InputError
from fedtune.core.manifest.model_release import ModelRelease
from fedtune.core.protocol.model_manifest import digest_file
from fedtune.core.secagg.identity import Identity
from fedtune.server import cli
from fedtune.server.export.merge import merge, open_run
from fedtune.server.export.request import ExportOptions

PROMPT = "turn on the lamp"


@pytest.fixture(scope="module")
def directory(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(make_run(), ["fp32"], tmp_path_factory.mktemp("served"))[0].path


@pytest.fixture(scope="module")
def model(directory: Path) -> ExportedModel:
    return ExportedModel(directory, "lamp")


@contextmanager
def serving(model: ExportedModel, slots: int = 16, queue: int = 64, token: str | None = None) -> Iterator[str]:
    scheduler = Scheduler(model, slots, queue)
    server = uvicorn.Server(uvicorn.Config(create_app(model, scheduler, token), log_level="error", ws="none"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        scheduler.close()
        assert not thread.is_alive()
        assert not scheduler.alive


@pytest.fixture(scope="module")
def url(model: ExportedModel) -> Iterator[str]:
    with serving(model) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


class WatchedModel(ExportedModel):
    """A model that calls `before(generator, sampling)` before each token."""

    def __init__(self, directory: Path, before: Callable[[object, Sampling], None]) -> None:
        super().__init__(directory, "lamp")
        self._before = before

    def generator(self, prompt_tokens: int, sampling: Sampling, adapter: Adapter | None = None) -> Any:
        return WatchedGenerator(super().generator(prompt_tokens, sampling, adapter), sampling, self._before)


class WatchedGenerator:
    def __init__(self, real: Any, sampling: Sampling, before: Callable[[object, Sampling], None]) -> None:
        self._real, self._sampling, self._before = real, sampling, before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def generate_next_token(self) -> None:
        self._before(self, self._sampling)
        self._real.generate_next_token()


class SlowReader(ExportedModel):
    """A tokenizer that takes as long as a test wants."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "lamp")
        self.begun, self.go_on = threading.Event(), threading.Event()

    def encode(self, text: str) -> list[int]:
        del text
        self.begun.set()
        self.go_on.wait(20)
        return [1]

    def encode_chat(self, messages: object) -> list[int]:
        return self.encode(str(messages))


def merged_text(run: Path, prompt: str, tokens: int) -> str:
    finished = open_run(run)
    merge(finished)
    tokenizer: Any = finished.base.tokenizer
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        for _ in range(tokens):
            following = finished.base.network(ids).logits[0, -1].argmax()
            if int(following) == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following[None, None]], dim=1)
    prompt_tokens = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return str(tokenizer.decode(ids[0, prompt_tokens:], skip_special_tokens=True))


def test_a_completion_is_what_the_merged_model_writes(client: openai.OpenAI, make_run: MakeRun) -> None:
    answer = client.completions.create(model="lamp", prompt=PROMPT, max_tokens=24, temperature=0)
    assert answer.choices[0].text == merged_text(make_run(), PROMPT, 24)
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize(
    ("path", "content"),
    [("completions", {"prompt": PROMPT}), ("chat/completions", {"messages": [{"role": "user", "content": PROMPT}]})],
)
def test_a_prompt_that_takes_long_to_tokenise_holds_nobody_up(
    directory: Path, path: str, content: dict[str, Any]
) -> None:
    model = SlowReader(directory)
    statuses: list[int] = []
    with serving(model) as url:

        def ask() -> None:
            statuses.append(httpx.post(f"{url}/v1/{path}", json={"model": "lamp", **content}, timeout=60).status_code)

        asking = threading.Thread(target=ask)
        asking.start()
        assert model.begun.wait(20)
        try:
            assert httpx.get(f"{url}/health", timeout=10).status_code == 200
        finally:
            model.go_on.set()
            asking.join()
    assert statuses == [200]


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "lamp", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**settings)
    chunks = list(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert len(chunks) > 5
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason


def test_an_event_is_one_line_to_every_client() -> None:
    body = {"text": "".join(map(chr, range(0x3000))) + "\U0001f3e0"}
    line, *rest = event(body).decode().splitlines()
    assert rest == [""]
    assert json.loads(line.removeprefix("data: ")) == body


def test_seeds_repeat_and_temperature_varies(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        settings: dict[str, Any] = {"model": "lamp", "prompt": PROMPT, "max_tokens": 12}
        answer = client.completions.create(**settings, temperature=1.5, top_p=0.9, seed=seed)
        return str(answer.choices[0].text)

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(5)}) > 1


def test_an_answer_ends_before_a_stop_string(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="lamp", prompt=PROMPT, max_tokens=30, temperature=0).choices[0].text
    stop = whole[8:11]
    cut = client.completions.create(model="lamp", prompt=PROMPT, max_tokens=30, temperature=0, stop=stop)
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_models_health_and_metrics(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == ["lamp"]
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "model": "lamp", "active": 0, "waiting": 0}
    text = httpx.get(f"{url}/metrics").text
    assert 'fedtune_requests_total{endpoint="/v1/models",status="200"}' in text
    assert "fedtune_first_token_seconds_bucket" in text


def test_requests_that_cannot_be_honoured_are_refused_as_openai_does(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="'oven' does not exist; expected lamp"):
        client.completions.create(model="oven", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="context is 256 for both together") as caught:
        client.completions.create(model="lamp", prompt="lamp " * 400)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="lamp", messages=[{"role": "user", "content": "hello"}])
    for wrong in ({"n": 2}, {"logit_bias": {"5": 1}}, {"temperature": 3}, {"max_tokens": 0}, {"stop": [""]}):
        with pytest.raises(openai.BadRequestError, match=next(iter(wrong))):
            client.completions.create(**{"model": "lamp", "prompt": PROMPT, **wrong})  # type: ignore[call-overload]
    for elsewhere in ({"top_k": 40}, {"min_p": 0.1}, {"repetition_penalty": 1.3}, {"tool_choice": "required"}):
        with pytest.raises(openai.BadRequestError, match=f"{next(iter(elsewhere))}: not supported by this server"):
            client.completions.create(model="lamp", prompt=PROMPT, max_tokens=1, extra_body=elsewhere)
    off = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "tool_choice": "auto", "stop_token_ids": []}
    client.completions.create(model="lamp", prompt=PROMPT, max_tokens=1, extra_body=off)
    for body, status in (
        (b"{", 400),
        (b"[]", 400),
        (b"\xff", 400),
        (b'{"model": "lamp"}', 400),
        (b'{"model": "lamp", "prompt": [9999999]}', 400),
        (b'{"model": "lamp", "prompt": ""}', 400),
        (b"x" * (1 << 21), 413),
        (b"[" * 100_000, 400),
    ):
        answer = httpx.post(f"{url}/v1/completions", content=body)
        assert answer.status_code == status, body[:40]
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{url}/v1/nothing").json()["error"]["message"] == "GET /v1/nothing: Not Found"
    assert httpx.get(f"{url}/v1/completions").status_code == 405


def test_a_body_without_a_length_is_bounded_too(url: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * (1 << 16)

    answer = httpx.post(f"{url}/v1/completions", content=endless())
    assert answer.status_code == 413


def test_only_the_token_gives_access(model: ExportedModel) -> None:
    with serving(model, token="secret") as url:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="guess", max_retries=0).models.list()
        assert [found.id for found in openai.OpenAI(base_url=f"{url}/v1", api_key="secret").models.list()] == ["lamp"]
        assert httpx.get(f"{url}/metrics").status_code == 401
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.headers["connection"]) == (200, "close")
        bearer = {"Authorization": "Bearer secret"}
        assert "connection" not in httpx.get(f"{url}/health", headers=bearer).headers
        assert httpx.get(f"{url}/v1/models", headers={b"Authorization": "Bearer gäst".encode()}).status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "LOCALHOST:8080", "Origin": "http://127.0.0.1:3000"}, 200),
        ({"Host": "[::1]:8080", "Origin": "https://[::1]"}, 200),
        ({"Host": "evil.example:8080"}, 421),
        ({"Host": "localhost.evil.example"}, 421),
        ({"Host": "127.0.0.1.nip.io"}, 421),
        ({"Host": "[::"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost@evil.example"}, 403),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/v1/completions"])
def test_without_a_token_no_page_of_elsewhere_can_ask(
    url: str, path: str, headers: dict[str, str], status: int
) -> None:
    if path == "/v1/completions":
        body = {"model": "lamp", "prompt": PROMPT, "max_tokens": 1}
        answer = httpx.post(url + path, content=json.dumps(body), headers={"Content-Type": "text/plain", **headers})
    else:
        answer = httpx.get(url + path, headers=headers)
    assert answer.status_code == status, answer.text
    assert (status == 200) or "is not this machine; expected localhost" in answer.json()["error"]["message"]


def test_a_request_without_a_host_or_with_two_is_refused(url: str) -> None:
    for hosts in ("", "Host: localhost\r\nHost: evil.example\r\n"):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            connection.sendall(f"GET /v1/models HTTP/1.0\r\n{hosts}\r\n".encode())
            assert connection.recv(100).split()[1] in (b"400", b"421")


def active(url: str) -> int:
    return int(httpx.get(f"{url}/health").json()["active"])


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_frees_its_slot_within_a_second(directory: Path, streamed: bool) -> None:
    model = WatchedModel(directory, lambda *_: time.sleep(0.05))
    body = {"model": "lamp", "prompt": PROMPT, "max_tokens": 200, "stream": streamed, "temperature": 0}
    with serving(model, slots=1, queue=0) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            content = json.dumps(body).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
            deadline = time.monotonic() + 5
            while not active(url) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert active(url) == 1
            refused = httpx.post(f"{url}/v1/completions", json=body)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
        gone = time.monotonic()
        while active(url):
            assert time.monotonic() - gone < 1
            time.sleep(0.02)


def test_streams_progress_fairly_and_all_are_answered(directory: Path) -> None:
    turns: list[object] = []
    model = WatchedModel(directory, lambda generator, _: turns.append(generator))
    scheduler = Scheduler(model, slots=16)
    done = threading.Semaphore(0)
    ends: list[str] = []

    def emit(piece: Piece) -> None:
        if piece.finish:
            ends.append(piece.finish)
            done.release()

    streams = [
        scheduler.submit(model.encode(PROMPT), Sampling(100, temperature=1.0, seed=seed), None, emit)
        for seed in range(20)
    ]
    for _ in streams:
        assert done.acquire(timeout=60)
    scheduler.close()
    assert set(ends) <= {"length", "stop"}
    assert scheduler.load == (0, 0)
    # Between two tokens of any stream, every other active stream has got one too.
    for index in range(200, 300):
        following = turns.index(turns[index], index + 1) if turns[index] in turns[index + 1 :] else None
        if following is not None:
            assert len(set(turns[index:following])) == following - index <= 16


def test_a_stream_that_fails_ends_alone(directory: Path) -> None:
    def fail(generator: object, sampling: Sampling) -> None:
        del generator
        if sampling.seed == 13:
            raise RuntimeError("out of memory")

    model = WatchedModel(directory, fail)
    with serving(model) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match="the model failed on this request"):
            client.completions.create(model="lamp", prompt=PROMPT, seed=13)
        assert client.completions.create(model="lamp", prompt=PROMPT, seed=12).choices[0].text


def test_adapters_are_listed_loaded_and_swapped_while_serving(make_run: MakeRun, tmp_path: Path) -> None:
    options = ExportOptions(force=True)
    for seed in (0, 1):
        export_adapter(make_run(seed=seed), "fp32", tmp_path, options)
    wanted = {f"run-{seed}": merged_text(make_run(seed=seed), PROMPT, 16) for seed in (0, 1)}
    assert wanted["run-0"] != wanted["run-1"]
    model = ExportedModel(tmp_path / "base-fp32", "base", tmp_path)
    model.load_adapter("run-0")
    with serving(model) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        def ask(name: str) -> str:
            answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=16, temperature=0)
            return answer.choices[0].text

        assert ask("run-0") == wanted["run-0"]
        with pytest.raises(openai.NotFoundError):
            ask("run-1")
        loaded = httpx.post(f"{url}/v1/adapters", json={"name": "run-1"}).json()
        assert [adapter["name"] for adapter in loaded["data"]] == ["run-0", "run-1"]
        assert [found.id for found in client.models.list()] == ["base", "run-0", "run-1"]
        assert (ask("run-1"), ask("run-0")) == (wanted["run-1"], wanted["run-0"])
        assert ask("base") not in wanted.values()

        # A stream keeps the adapter with which it began; the next request uses the new file of that name.
        held = model.acquire("run-0")
        for ending in (".onnx_adapter", ".json"):
            content = (tmp_path / f"run-1{ending}").read_bytes().replace(b"run-1.", b"run-0.")
            (tmp_path / f"run-0{ending}").write_bytes(content)
        httpx.post(f"{url}/v1/adapters", json={"name": "run-0"})
        assert ask("run-0") == wanted["run-1"]
        model.release(held)
        assert httpx.delete(f"{url}/v1/adapters/run-0").status_code == 200
        for name, reason in (("none", "cannot be read"), ("../run-1", "not a name"), ("base", "not a name")):
            answer = httpx.post(f"{url}/v1/adapters", json={"name": name})
            assert answer.status_code == 400
            assert reason in answer.json()["error"]["message"]

    (tmp_path / "run-1.onnx_adapter").write_bytes(b"changed")
    with pytest.raises(ExportError, match="was changed after the export"):
        model.load_adapter("run-1")


def test_chat_answers_piped_lines(make_run: MakeRun, make_model: Callable[..., Path], tmp_path: Path) -> None:
    run = shutil.copytree(make_run(), tmp_path / "run")
    (done,) = export_run(run, ["fp32"], tmp_path / "out")
    config = done.path / "tokenizer_config.json"
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    replaced(done.path, config.name, json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    sink = io.StringIO()
    lines = io.StringIO(f"{PROMPT}\n\n/reset\n{'lamp ' * 400}\n{PROMPT}\n")
    converse(ExportedModel(done.path), Sampling(16), remember=False, source=lines, sink=sink)
    text = merged_text(make_run(), PROMPT, 16)
    assert sink.getvalue().startswith(text + "\n(the prompt has")
    assert sink.getvalue().endswith(text + "\n")


def test_a_conversation_is_answered_whole_and_in_pieces(directory: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(directory, tmp_path / "copy")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    replaced(copy, "tokenizer_config.json", json.dumps(config | {"chat_template": template}))
    with (
        serving(ExportedModel(copy, "lamp")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        turns: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": PROMPT}]
        settings: dict[str, Any] = {"model": "lamp", "temperature": 0}
        whole = client.chat.completions.create(messages=turns, max_completion_tokens=20, **settings)
        text = whole.choices[0].message.content
        prompt = f"system: be brief\nuser: {PROMPT}\n"
        assert text == client.completions.create(prompt=prompt, max_tokens=20, **settings).choices[0].text
        chunks = list(
            client.chat.completions.create(
                messages=turns, max_tokens=20, stream=True, stream_options={"include_usage": True}, **settings
            )
        )
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
        assert chunks[-1].usage == whole.usage
        with pytest.raises(openai.BadRequestError, match="for both together") as caught:
            client.chat.completions.create(messages=[{"role": "user", "content": "lamp " * 400}], **settings)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="messages"):
            client.chat.completions.create(messages=[], **settings)


def test_a_tampered_directory_is_refused_with_the_file_named(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(directory, tmp_path / "copy")
    with (copy / "model.onnx.data").open("r+b") as file:
        file.write(b"\x01")
    for command in ("serve", "chat"):
        with pytest.raises(SystemExit) as caught:
            cli.main([command, str(copy)])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert "model.onnx.data: was changed" in error
        assert error.count("\n") == 1


def replaced(directory: Path, name: str, content: str) -> None:
    """Replaces a file and updates the manifest, as the author of the export could."""
    (directory / name).write_text(content)
    manifest = json.loads((directory / "fedtune.json").read_text())
    entry = digest_file(directory / name)
    manifest["files"][name] = {"sha256": entry.sha256, "bytes": entry.bytes}
    (directory / "fedtune.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("key", ["custom_ops_library", "trt_extra_plugin_lib_paths", "backend_path"])
def test_a_model_that_would_load_a_library_is_refused(directory: Path, tmp_path: Path, key: str) -> None:
    copy = shutil.copytree(directory, tmp_path / "copy")
    config = json.loads((copy / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = [{"any": {key: "tokenizer.json"}}]
    replaced(copy, "genai_config.json", json.dumps(config))
    with pytest.raises(ExportError, match=f"{key} would run code"):
        ExportedModel(copy)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer.json", "{}"),
        ("genai_config.json", "{}"),
        ("genai_config.json", '{"model": []}'),
    ],
)
def test_an_export_whose_files_are_not_what_they_should_be_is_refused(
    directory: Path, tmp_path: Path, name: str, content: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    replaced(copy, name, content)
    with pytest.raises(ExportError, match="cannot be loaded"):
        ExportedModel(copy)


def test_without_a_directory_the_pulled_model_answers(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTUNE_CLIENT_HOME", str(tmp_path))
    with pytest.raises(InputError, match="no model was pulled yet; expected MODEL_DIR, or first: fedtune client pull"):
        pulled_model()
    versions = Versions(tmp_path / "models")
    shutil.copytree(directory, versions.incoming("first-fp32-0"), dirs_exist_ok=True)
    versions.admit("first-fp32-0")
    versions.install("first-fp32-0", ModelRelease.sign(Identity(b"1" * 32), 1, "first", {"fp32": "0" * 64}, 0.0))
    assert pulled_model() == tmp_path / "models" / "first-fp32-0"
    assert ExportedModel(tmp_path / "models" / "current").manifest == ExportedModel(directory).manifest


def test_serving_others_needs_a_token(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FEDTUNE_TOKEN", raising=False)
    (tmp_path / "empty").touch()
    for arguments, reason in (
        (["--host", "0.0.0.0"], "expected --token-file"),
        (["--token-file", str(tmp_path / "none")], "none: cannot be read"),
        (["--token-file", str(tmp_path / "empty")], "empty: holds no token"),
        (["--adapters", str(tmp_path / "empty")], "not a directory"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["serve", str(directory), *arguments])
        assert caught.value.code == 2
        assert reason in capsys.readouterr().err


def test_inference_never_imports_torch() -> None:
    code = (
        "import sys, fedtune.client.inference.http_api, fedtune.client.inference.chat, fedtune.server.cli;"
        "sys.exit(bool({'torch', 'transformers', 'flwr'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
