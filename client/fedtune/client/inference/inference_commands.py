"""`fedtune serve` and `fedtune chat`: the commands of inference, which never load torch."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fedtune.core.errors import InputError, MissingExtraError
from fedtune.core.protocol.model_manifest import ADAPTER_SUFFIX

TOKEN_VARIABLE = "FEDTUNE_TOKEN"
MAX_TOKEN_BYTES = 4096
_MODEL = Annotated[
    Path | None,
    typer.Argument(
        metavar="[MODEL_DIR]",
        help="A directory that fedtune export wrote, e.g. runs/demo-1/onnx/int4; by default this device's own model, "
        "the one that fedtune client pull installed.",
    ),
]

_Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="CPU threads; by default one for each physical core.")
]


def serve(
    model_directory: _MODEL = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. Any address but loopback is open to other machines, and needs a token. Without "
            "one, requests must name this machine: localhost or its address, also as the origin of a page."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free port, and prints it.")] = 8080,
    slots: Annotated[
        int,
        typer.Option(min=1, max=1024, help="Answers generated at the same time; each takes memory for its own text."),
    ] = 16,
    queue: Annotated[
        int, typer.Option(min=0, max=65536, help="Requests that may wait for a slot; further ones get status 429.")
    ] = 64,
    threads: _Threads = None,
    name: Annotated[str | None, typer.Option(help="The model's name in requests; by default the export's own.")] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of .onnx_adapter files, for a base from fedtune export --adapter-only. All are loaded, each a "
            "model of its own name; POST /v1/adapters loads or swaps one later.",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"File with the token that requests must bring; or set {TOKEN_VARIABLE}."),
    ] = None,
) -> None:
    """Answer prompts with an exported model, over the HTTP API that OpenAI's clients speak.

    Needs the extra [inference], and no torch. Every file is checked before it is loaded. It serves
    /v1/completions, /v1/chat/completions (both also as streams), /v1/models, /v1/adapters, /health, and /metrics for
    Prometheus, until Ctrl-C. Examples:

        fedtune serve runs/demo-1/onnx/int4

        curl localhost:8080/v1/completions -d '{"model": "demo-1", "max_tokens": 64,
            "prompt": "bake for 25 minutes at 180 degrees =>"}'

        fedtune serve models/adapters/base-int4 --adapters models/adapters

    A program that uses the openai package needs base_url="http://localhost:8080/v1" and nothing else changed.
    """
    answer_requests(
        Serving(
            directory=model_directory or pulled_model(),
            host=host,
            port=port,
            slots=slots,
            queue=queue,
            threads=threads,
            name=name,
            adapters=adapters,
            token_file=token_file,
        )
    )


def chat(
    model_directory: _MODEL = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens after which an answer is cut; a token is a few letters.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="Randomness of the answer; 0 always takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=0.01, max=1, help="Choose among the likeliest tokens that make up this share; 1 is all."),
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="With a temperature above 0: the same seed gives the same answers.")
    ] = None,
    threads: _Threads = None,
    forget: Annotated[
        bool,
        typer.Option(
            "--forget", help="Answer every prompt by itself, for models that were not trained on conversations."
        ),
    ] = False,
) -> None:
    """Chat with an exported model in the terminal; piped input is answered line by line.

    Needs the extra [inference], and no torch. At the prompt, /reset forgets the conversation and /quit ends;
    Ctrl-C stops an answer. Examples:

        fedtune chat runs/demo-1/onnx/int4 --forget

        echo "water the lavender with 12 liters" | fedtune chat runs/demo-1/onnx/int4
    """
    try:
        from fedtune.client.inference.chat import converse
        from fedtune.client.inference.exported_model import ExportedModel, Sampling
    except ModuleNotFoundError as error:
        raise MissingExtraError("fedtune chat", "inference", error.name or "onnxruntime-genai") from error

    model = ExportedModel(model_directory or pulled_model(), threads=threads)
    converse(model, Sampling(max_tokens, temperature, top_p, seed), remember=not forget)


@dataclass(frozen=True)
class Serving:
    """The options of `fedtune serve`.

    Args:
        directory: an exported model.
        slots: answers that are generated at the same time.
        queue: requests that may wait for a slot.
        threads: threads for each token; None leaves the number to onnxruntime.
        name: name of the model; None for the export's own.
        adapters: folder whose `.onnx_adapter` files are loaded.
        token_file: file of the token; None takes the token of the environment, if any.
    """

    directory: Path
    host: str = "127.0.0.1"
    port: int = 8080
    slots: int = 16
    queue: int = 64
    threads: int | None = None
    name: str | None = None
    adapters: Path | None = None
    token_file: Path | None = None


def answer_requests(wanted: Serving) -> None:
    """Serves a model until the process is stopped.

    Raises:
        InputError: the address is open to other machines without a token, the model cannot be loaded, or the port is
            in use.
        MissingExtraError: the packages of inference are not installed.
    """
    try:
        import uvicorn

        from fedtune.client.inference.exported_model import ExportedModel
        from fedtune.client.inference.http_api import create_app, is_loopback
        from fedtune.client.inference.scheduler import Scheduler
        from fedtune.core.host.connections import MAX_HEAD_BYTES, bounded_http
    except ModuleNotFoundError as error:
        raise MissingExtraError("fedtune serve", "inference", error.name or "onnxruntime-genai") from error

    token = read_token(wanted.token_file)
    if token is None and not is_loopback(wanted.host):
        raise InputError(f"--host {wanted.host}: others could use the model; expected --token-file or {TOKEN_VARIABLE}")
    if wanted.adapters is not None and not wanted.adapters.is_dir():
        raise InputError(f"--adapters {wanted.adapters}: not a directory")
    model = ExportedModel(wanted.directory, wanted.name, wanted.adapters, wanted.threads)
    for path in sorted(wanted.adapters.glob(f"*{ADAPTER_SUFFIX}")) if wanted.adapters else []:
        model.load_adapter(path.name.removesuffix(ADAPTER_SUFFIX))
    config = uvicorn.Config(
        create_app(model, Scheduler(model, wanted.slots, wanted.queue), token),
        host=wanted.host,
        port=wanted.port,
        log_level="warning",
        http=bounded_http(),
        limit_concurrency=2 * (wanted.slots + wanted.queue) + 32,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
    listener = _bind(wanted.host, wanted.port)
    address, bound = listener.getsockname()[:2]
    loaded = f", adapters {', '.join(model.adapters)}" if model.adapters else ""
    print(f"{model.name} ({model.manifest.format}{loaded}) on http://{address}:{bound}/v1", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


def pulled_model() -> Path:
    """Returns the current model of this device, as set by a pull or a rollback.

    Raises:
        InputError: it has none.
    """
    from fedtune.client.inference.model_versions import Versions
    from fedtune.client.live.device_home import MODELS, default_home

    folder = default_home() / MODELS
    if (path := Versions(folder).current) is None:
        raise InputError(f"{folder}: no model was pulled yet; expected MODEL_DIR, or first: fedtune client pull")
    return path


def read_token(file: Path | None) -> str | None:
    """Returns the bearer token from the file or the environment, or None.

    Raises:
        InputError: the file cannot be read or holds no token.
    """
    if file is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip() or None
    try:
        with file.open("rb") as opened:
            token = opened.read(MAX_TOKEN_BYTES + 1).decode("ascii").strip()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}; expected a token") from error
    except UnicodeDecodeError:
        token = ""
    if not token or len(token) > MAX_TOKEN_BYTES or not token.isprintable():
        raise InputError(f"{file}: holds no token; expected one line of ASCII, at most {MAX_TOKEN_BYTES} bytes")
    return token


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InputError(f"{host}:{port}: cannot be listened on: {error.strerror}") from error
    return listener
