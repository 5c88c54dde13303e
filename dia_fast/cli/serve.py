"""`dia-fast serve`: an HTTP server in the manner of the OpenAI API, with a page for the browser."""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dia_fast.cli.paths import path
from dia_fast.cli.speak import OFFICIAL_MODEL, add_model, set_threads
from dia_fast.errors import InputError

if TYPE_CHECKING:
    from dia_fast.api import Dia
    from dia_fast.server.options import Options
    from dia_fast.server.ray_serve import RayOptions

PREFIX = "DIA_FAST_"

DESCRIPTION = """\
Serves speech over HTTP, as the OpenAI API does: POST /v1/audio/speech, voices, models, errors. Many requests share one
batch; sound is sent while it is made; the same request with the same seed gives the same bytes, alone or under load.

Without --model it is the demo voice of the package. A page for the browser is at /, the API is described at /docs.
"""

EPILOG = f"""\
Every option can be given in the environment: --max-queue 8 is {PREFIX}MAX_QUEUE=8, a switch is {PREFIX}UPLOADS=1, lists
are separated by commas. What the command line says counts.

The first SIGTERM or Ctrl-C makes /ready answer 503 and lets open streams come to their end; the second ends them.

examples:
  the demo voice, and a sentence of it
    dia-fast serve
    curl http://127.0.0.1:8000/v1/audio/speech -H "Content-Type: application/json" \\
      -d '{{"input": "[S1] Please open the red door.", "response_format": "wav"}}' -o out.wav
  Dia itself for other machines, with a key, and voices that users may add
    {PREFIX}API_KEY=$(openssl rand -hex 16) dia-fast serve --model {OFFICIAL_MODEL} --host 0.0.0.0 \\
      --voices voices --uploads
  from Python, with the client of OpenAI
    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.audio.speech.create(model="tts-1", voice="alloy", input="[S1] Hello.").write_to_file("out.mp3")
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="serve speech over HTTP, with a page for the browser",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument("--served-name", metavar="NAME", help="id of the model in /v1/models (default: the model's)")
    parser.add_argument("--voices", type=path, metavar="FOLDER", help="recordings name.wav, their words name.txt")
    parser.add_argument("--uploads", action="store_true", help="let clients add and delete voices of the folder")
    parser.add_argument(
        "--preload", action="append", default=[], metavar="VOICE", help="voice that must be there, or the start fails"
    )
    parser.add_argument("--max-batch", type=int, default=None, metavar="N", help="texts at a time, 1 to 32 (32)")
    parser.add_argument("--memory", metavar="BYTES", help="for keys and values, as in 4GB (up to half of what is free)")
    parser.add_argument(
        "--dia-tts-server-compat", action="store_true", help="serve /tts and the other routes of Dia-TTS-Server as well"
    )
    _add_network(parser.add_argument_group("network"))
    _add_limits(parser.add_argument_group("limits"))
    log = parser.add_argument_group("log")
    log.add_argument("--log-format", choices=("text", "json"), default="text", help="default: %(default)s")
    log.add_argument("--log-text", action="store_true", help="write the texts of requests into the log")
    cluster = parser.add_argument_group("Ray", 'Replicas on the machines of a cluster; needs the extra "ray".')
    cluster.add_argument(
        "--ray", metavar="ADDRESS", help='HOST:PORT, ray://HOST:PORT, "auto", or "local" for one on this machine alone'
    )
    cluster.add_argument("--replicas", type=int, default=1, metavar="N", help="engines, at least (%(default)s)")
    cluster.add_argument("--max-replicas", type=int, metavar="N", help="engines, at most, as requests demand")
    cluster.add_argument("--cpus-per-replica", type=float, default=1.0, metavar="N", help="which each reserves (1)")
    cluster.add_argument(
        "--gpus-per-replica", type=float, metavar="N", help="which each reserves (default: 1 where there are GPUs)"
    )
    _from_environment(parser)
    return parser


def _add_network(group: Any) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s: this machine only)")
    group.add_argument("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    group.add_argument(
        "--api-key", metavar="KEY", help=f"better as {PREFIX}API_KEY: others see the command line of a process"
    )
    group.add_argument("--no-page", action="store_true", help="serve the API without the page for the browser")
    group.add_argument("--api-key-file", type=path, metavar="FILE", help="several keys, one a line")
    group.add_argument("--no-auth", action="store_true", help="serve everybody, though others can reach the host")
    group.add_argument(
        "--cors-origin", action="append", default=[], metavar="URL", help="pages of that origin may call the server"
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name under which requests reach a loopback address, as through a proxy (localhost only)",
    )


def _add_limits(group: Any) -> None:
    group.add_argument("--max-queue", type=int, default=64, metavar="N", help="requests that wait; 429 beyond (64)")
    group.add_argument(
        "--request-timeout", type=float, default=300.0, metavar="S", help="seconds to the first sound; 504 beyond (300)"
    )
    group.add_argument("--max-body", default="25MB", metavar="BYTES", help="largest request; 413 beyond (%(default)s)")
    group.add_argument(
        "--drain-seconds", type=float, default=30.0, metavar="S", help="for open streams at the end (30)"
    )
    group.add_argument(
        "--drain-delay",
        type=float,
        default=0.0,
        metavar="S",
        help="how long connections are still taken after the signal, until balancers have noticed (0)",
    )


def _from_environment(parser: argparse.ArgumentParser) -> None:
    """Make the environment the default of every option. Strings are converted as those of the command line."""
    for action in parser._actions:
        name = max(action.option_strings, key=len).removeprefix("--").replace("-", "_").upper()
        value = os.environ.get(PREFIX + name)
        if not value or name == "HELP":
            continue
        if isinstance(action, argparse._StoreTrueAction):
            if value.lower() not in ("1", "0", "true", "false", "yes", "no"):
                parser.error(f"{PREFIX}{name} must be 1 or 0, not {value!r}")
            action.default = value.lower() in ("1", "true", "yes")
        elif isinstance(action, argparse._AppendAction):
            action.default = [part.strip() for part in value.split(",") if part.strip()]
        else:
            if action.choices is not None and value not in action.choices:
                parser.error(f"{PREFIX}{name} must be one of {', '.join(action.choices)}, not {value!r}")
            action.default = value


def run(args: argparse.Namespace) -> int:
    """Check the options, open the port, and load the model while the server answers already."""
    try:
        from dia_fast.server.run import serve
    except ImportError as error:
        raise InputError(
            f'the server needs packages that are not installed ({error.name}): pip install "dia-fast[server]"'
        ) from error
    options, load = _chosen(args)
    if args.ray is None:
        if args.max_replicas is not None or args.replicas != 1:
            raise InputError("--replicas and --max-replicas are for --ray ADDRESS")
        serve(options, load)
    else:
        from dia_fast.server.ray_serve import serve_on_ray

        serve_on_ray(options, load, _ray_options(args))
    return 0


def build_app(args: dict[str, Any]) -> Any:
    """Build the application for `serve run`, `serve deploy` and KubeRay's RayService.

    Args:
        args: Options of `dia-fast serve` by name, as in `{"model": "demo", "max_batch": 16, "no_auth": True}`.

    Raises:
        InputError: An option is unknown or its value cannot be used.
    """
    import ray

    from dia_fast.cli.app import build_parser
    from dia_fast.server.ray_serve import application

    words = ["serve", "--ray", "auto"]
    for name, value in args.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [] if value in (None, False) else [flag, str(value)]
    try:
        chosen = build_parser().parse_args(words)
    except SystemExit as error:
        raise InputError(f"these are not options of dia-fast serve: {args}") from error
    options, load = _chosen(chosen)
    ray_options = _ray_options(chosen)
    gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    given = ray_options.gpus_per_replica
    return application(options, load, ray_options, gpus if given is None else given)


def _ray_options(args: argparse.Namespace) -> "RayOptions":
    from dia_fast.server.ray_serve import RayOptions

    names = ("replicas", "max_replicas", "cpus_per_replica", "gpus_per_replica")
    return RayOptions(args.ray, **{name: getattr(args, name) for name in names})


def _chosen(args: argparse.Namespace) -> "tuple[Options, Callable[[], Dia]]":
    """The options of the server, and what loads its model."""
    from dia_fast.checkpoint.demo import DEMO
    from dia_fast.engine import MAX_BATCH
    from dia_fast.generation.inputs import _bytes, engine_limits
    from dia_fast.server.options import Options, read_keys

    keys: tuple[str, ...] = (args.api_key,) if args.api_key is not None else ()
    if args.api_key_file is not None:
        keys += read_keys(args.api_key_file)
    model = args.model or DEMO
    max_batch = MAX_BATCH if args.max_batch is None else args.max_batch
    engine_limits(max_batch, args.memory)
    options = Options(
        host=args.host,
        port=args.port,
        served_name=args.served_name or (Path(model).name if os.path.isdir(model) else model),
        demo=model == DEMO,
        voices=None if args.voices is None else Path(args.voices),
        uploads=args.uploads,
        preload=tuple(args.preload),
        max_batch=max_batch,
        max_queue=args.max_queue,
        request_timeout=args.request_timeout,
        keys=keys,
        no_auth=args.no_auth,
        page=not args.no_page,
        compat=args.dia_tts_server_compat,
        cors_origins=tuple(args.cors_origin),
        allowed_hosts=tuple(args.allowed_host),
        max_body=_bytes(args.max_body) or 0,
        drain_seconds=args.drain_seconds,
        drain_delay=args.drain_delay,
        log_format=args.log_format,
        log_text=args.log_text,
    )
    return options, partial(_load, args, model, max_batch)


def _load(args: argparse.Namespace, model: str, max_batch: int) -> "Dia":
    from dia_fast.api import Dia
    from dia_fast.model.fused_weights import parameter_count

    dia = Dia.from_pretrained(
        model,
        device=args.device,
        dtype=args.dtype,
        weights=args.weights,
        backend=args.backend,
        codec=args.codec,
        codec_dtype=args.codec_dtype,
        revision=args.revision,
        local_files_only=args.offline,
        max_batch=max_batch,
        memory=args.memory,
    )
    set_threads(args.threads, parameter_count(dia.config))
    return dia
