"""`megalith serve`."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import click

from megalith.format.errors import UnsupportedError
from megalith.output import human_bytes, print_json

KEY_VARIABLE = "MEGALITH_API_KEYS"


def _read_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Take defaults from a TOML file whose keys are the names of options."""
    if value is None:
        return None
    try:
        settings = tomllib.loads(value.read_text())
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{value}: {error}", ctx, param) from None
    known = {option.name for option in ctx.command.params} - {"file", "config"}
    names = {name.replace("-", "_"): item for name, item in settings.items()}
    unknown = sorted(set(names) - known)
    if unknown:
        raise click.BadParameter(f"{value}: unknown option {unknown[0]!r}", ctx, param)
    ctx.default_map = {**(ctx.default_map or {}), **names}
    return value


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--config", type=click.Path(path_type=Path), is_eager=True, callback=_read_config, help="TOML file of options.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 takes a free one.")
@click.option("--served-model-name", metavar="NAME", help="The model's name; default: the file's.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "numpy", "cupy", "echo"]),
    default="auto",
    show_default=True,
    help="echo answers with the prompt and runs no model.",
)
@click.option("--api-key", "api_keys", multiple=True, metavar="KEY", help=f"Key that clients must show; also {KEY_VARIABLE}.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File with a key a line.")
@click.option("--max-seq-len", type=click.IntRange(2), help="Longest context; default: the file's, as memory allows.")
@click.option(
    "--max-sequences", type=click.IntRange(1, 1024), default=64, show_default=True, help="Sequences that run at once."
)
@click.option(
    "--max-batch-tokens", type=click.IntRange(2), show_default="512, on a GPU 2048", help="Tokens of one forward pass."
)
@click.option(
    "--prefill-chunk",
    type=click.IntRange(1),
    default=192,
    show_default=True,
    help="Prompt tokens of a pass in which sequences decode, or, if that is more, 4 for each that runs or waits and 4 more for "
    "each whose prompt is not read yet: fewer make tokens come more evenly, more make a full queue shorter.",
)
@click.option("--kv-cache-mib", type=click.IntRange(1), help="Memory of the KV cache; default: what the backend finds free.")
@click.option("--max-queue", type=click.IntRange(0, 1 << 20), default=256, show_default=True, help="Sequences that wait.")
@click.option("--request-timeout", type=click.FloatRange(0.1), default=600.0, show_default=True, help="Seconds of a request.")
@click.option(
    "--pass-timeout",
    type=click.FloatRange(0.1),
    show_default="600, on a GPU 60",
    help="Seconds of a forward pass, after which the engine is taken to hang and started again.",
)
@click.option("--body-timeout", type=click.FloatRange(0.1), default=30.0, show_default=True, help="Seconds of a body.")
@click.option("--header-timeout", type=click.FloatRange(0.1), default=10.0, show_default=True, help="Seconds of headers.")
@click.option("--max-body-mib", type=click.IntRange(1, 1024), default=8, show_default=True, help="Largest body.")
@click.option("--drain-timeout", type=click.FloatRange(1), default=30.0, show_default=True, help="Seconds after SIGTERM.")
@click.option("--cors-origin", "cors_origins", multiple=True, metavar="ORIGIN", help="Origin that browsers may call from.")
@click.option("--tls-cert", type=click.Path(path_type=Path, exists=True), help="Certificate chain in PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path, exists=True), help="Its private key.")
@click.option(
    "--verify",
    type=click.Choice(["none", "full"]),
    default="none",
    show_default=True,
    help="full checks every byte's checksum before it serves.",
)
@click.option("--log-level", type=click.Choice(["debug", "info", "error", "none"]), default="info", show_default=True)
@click.option("--echo-step-ms", type=click.FloatRange(0), default=0.0, help="With --backend echo: time of a forward pass.")
@click.option("--no-cuda-graph", is_flag=True, help="Launch every kernel of a decode step by itself; NumPy has no graphs.")
@click.option(
    "--batch-invariant", is_flag=True,
    help="On a GPU: what a request gets is the same to the bit alone and in any batch, unless it is interrupted for lack of "
    "memory. Takes one kernel for every batch, so it is slower.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print memory plan and limits, and stop.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print JSON.")
def serve(file: Path, config: Path | None, **options: Any) -> None:
    """Serve the packed file FILE to OpenAI clients. Logs go to standard error, a JSON object a line.

    SIGTERM lets running requests finish, for --drain-timeout at most; a second one stops at once.
    """
    if (options["tls_cert"] is None) != (options["tls_key"] is None):
        raise click.UsageError("--tls-cert and --tls-key go together")
    if options["as_json"] and not options["dry_run"]:
        raise click.UsageError("--json goes with --dry-run")
    _need_server_packages()
    from megalith.format.reader import PackedFile
    from megalith.runtime.serving_plan import serving_plan

    packed = PackedFile(file)
    plan = serving_plan(
        packed,
        options["backend"],
        max_seq_len=options["max_seq_len"],
        max_sequences=options["max_sequences"],
        kv_bytes=options["kv_cache_mib"] << 20 if options["kv_cache_mib"] else None,
        max_batch_tokens=options["max_batch_tokens"],
        prefill_chunk=options["prefill_chunk"],
        pass_timeout=options["pass_timeout"],
        step_seconds=options["echo_step_ms"] / 1e3,
        use_graphs=not options["no_cuda_graph"],
        batch_invariant=options["batch_invariant"],
    )
    if options["dry_run"]:
        packed.close()
        _print_plan(plan.to_dict() | {"max_queue": options["max_queue"]}, options["as_json"])
        return
    if options["verify"] == "full":
        _verify(packed)
    _run(packed, plan, options)


def _need_server_packages() -> None:
    try:
        import msgspec  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(f"{error.name} is missing: install megalith with its serve extra, 'megalith[serve]'") from None


def _verify(packed: Any) -> None:
    """CorruptionError naming the first broken chunk."""
    from megalith.converter.convert import default_jobs
    from megalith.format.errors import CorruptionError
    from megalith.format.verify import verify_checksums

    broken = verify_checksums(packed, default_jobs(), lambda count: None)
    if broken:
        raise CorruptionError(f"{packed.path}: {broken[0].describe()}")
    packed.check_rest()


def _run(packed: Any, plan: Any, options: dict[str, Any]) -> None:
    from megalith.runtime.server.auth import read_keys
    from megalith.runtime.server.logs import set_level
    from megalith.runtime.server.run import ServerOptions, serve

    set_level(options["log_level"])
    keys = read_keys(options["api_keys"], options["api_key_file"], os.environ.get(KEY_VARIABLE))
    serve(
        packed,
        plan,
        ServerOptions(
            host=options["host"],
            port=options["port"],
            model_id=options["served_model_name"],
            keys=tuple(keys),
            max_queue=options["max_queue"],
            max_body_bytes=options["max_body_mib"] << 20,
            body_seconds=options["body_timeout"],
            request_seconds=options["request_timeout"],
            drain_seconds=options["drain_timeout"],
            header_seconds=options["header_timeout"],
            cors_origins=options["cors_origins"],
            tls_cert=options["tls_cert"],
            tls_key=options["tls_key"],
        ),
    )


def _print_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"plan": plan})
        return
    for name, value in plan.items():
        shown = human_bytes(value) if name.endswith("_bytes") else value
        click.echo(f"{name:20} {shown}")
