"""`megalith generate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megalith.format.errors import EXIT_DIFFERENT
from megalith.output import TRACE_HELP, print_json, print_traced

if TYPE_CHECKING:
    from megalith.runtime.tokenizer import Tokenizer
    from megalith.runtime.trace import Trace


def _ids(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """Token ids with commas between."""
    if value is None:
        return None
    words = value.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise click.BadParameter("give token ids with commas between, such as 504,3575,282")
    return [int(word) for word in words]


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="Text to continue.")
@click.option("--chat", metavar="TEXT", help="A user's message, put into the model's chat template.")
@click.option("--prompt-ids", callback=_ids, metavar="IDS", help="Token ids to continue, with commas between.")
@click.option("--system", metavar="TEXT", help="A system message before --chat.")
@click.option("--max-tokens", type=click.IntRange(0), default=256, show_default=True, help="Most tokens to generate.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token each time.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Sample among the K likeliest; 0 is off.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Sample among the likeliest that make up P.")
@click.option("--min-p", type=float, default=0.0, show_default=True, help="Sample among those with P times the best's share.")
@click.option("--seed", type=int, help="Makes sampling repeatable; default: a new one each time.")
@click.option("--ignore-eos", is_flag=True, help="Go on after an end-of-sequence token.")
@click.option("--backend", type=click.Choice(["auto", "numpy", "cupy"]), default="auto", show_default=True)
@click.option("--no-cuda-graph", is_flag=True, help="Launch every kernel of a decode step by itself; NumPy has no graphs.")
@click.option(
    "--trace", "trace_path", type=click.Path(path_type=Path), metavar="OUT.json",
    help=TRACE_HELP.format(
        what="of the host, with NumPy of every operation, on a GPU of every kernel of the first prefill and four decode steps"
    ),
)  # fmt: skip
@click.option(
    "--check", is_flag=True,
    help="Compare the GPU with NumPy instead, operation by operation: a prefill of the prompt's first 512 tokens (of 64 random "
    "ones without a prompt), then three decode steps; relative errors of the residual stream and of logits. Exit "
    "code 1 where one is above 16 units of the matrices' rounding (BF16 0.0625, FP16 0.0078). NumPy may take minutes.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print prompt ids, token ids, text and timings as JSON.")
def generate(file: Path, trace_path: Path | None, check: bool, as_json: bool, **options: Any) -> int:
    """Generate text from the packed file FILE; it streams to standard output as it comes, as ids if FILE has no tokenizer."""
    num_prompts = sum(options[name] is not None for name in ("prompt", "chat", "prompt_ids"))
    if num_prompts != 1 and not (check and not num_prompts):
        raise click.UsageError("give one of --prompt, --chat and --prompt-ids")
    if options["system"] is not None and options["chat"] is None:
        raise click.UsageError("--system goes with --chat")
    if check and (trace_path is not None or options["backend"] == "numpy"):
        raise click.UsageError("--check runs on the GPU and on NumPy: it goes without --trace and --backend numpy")
    if options["backend"] != "numpy":
        from megalith.runtime.waking import wake_device

        wake_device()  # while this thread imports
    if check:
        return _check(file, as_json, options)
    from megalith.runtime.trace import tracing

    with tracing(trace_path) as trace:
        report = _generate(file, trace, as_json, options)
    print_traced(report if as_json else None, trace_path)
    return 0


def _check(file: Path, as_json: bool, options: dict[str, Any]) -> int:
    import megalith
    from megalith.checking import check
    from megalith.runtime.tokenizer import Tokenizer

    prompt_ids = options["prompt_ids"]
    if options["prompt"] is not None or options["chat"] is not None:
        with megalith.open(file) as packed:
            prompt_ids = prompt_tokens(options, lambda: Tokenizer(packed))
    report = check(file, prompt_ids)
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo("\n".join(report.lines()))
    return 0 if report.first_above is None else EXIT_DIFFERENT


def _generate(file: Path, trace: Trace | None, as_json: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Prints text unless JSON is wanted; what JSON says."""
    import secrets

    import megalith
    from megalith.runtime.trace import host_span

    with host_span(trace, "import"):
        import megalith.runtime.engine
        from megalith.runtime.sampler import SamplingParameters

    seed = secrets.randbits(32) if options["seed"] is None else options["seed"]
    parameters = SamplingParameters(options["temperature"], options["top_k"], options["top_p"], options["min_p"], seed)
    begun = time.perf_counter()
    with host_span(trace, "load"):
        engine = megalith.load(file, options["backend"], use_graphs=not options["no_cuda_graph"], trace=trace)
    loaded = time.perf_counter()
    with host_span(trace, "tokenise"):
        prompt_ids = prompt_tokens(options, lambda: engine.tokenizer)
    ignore_eos = options["ignore_eos"]
    tokens, times = [], [time.perf_counter()]
    with host_span(trace, "generate", prompt_tokens=len(prompt_ids)):
        for token in engine.generate_tokens(prompt_ids, parameters, max_tokens=options["max_tokens"], ignore_eos=ignore_eos):
            tokens.append(token)
            times.append(time.perf_counter())
            if not as_json:
                click.echo(token.text if engine.has_tokenizer else f"{token.id} ", nl=False)
    if not as_json:
        click.echo()
    return {
        "prompt_ids": prompt_ids,
        "ids": [token.id for token in tokens],
        "text": "".join(token.text for token in tokens),
        "finish_reason": _finish_reason(tokens[-1].id if tokens else None, engine.config.eos_token_ids, ignore_eos),
        "seed": seed,
        "load_seconds": loaded - begun,
        "prefill_seconds": times[1] - times[0] if tokens else None,
        "decode_tokens_per_second": (len(tokens) - 1) / (times[-1] - times[1]) if len(tokens) > 1 else None,
    }


def prompt_tokens(options: dict[str, Any], tokenizer: Callable[[], Tokenizer]) -> list[int]:
    """Those of --prompt-ids; else ids of --prompt, or of --chat and --system in the model's template."""
    if options["prompt_ids"] is not None:
        return list(options["prompt_ids"])
    if options["chat"] is None:
        return tokenizer().encode(options["prompt"] or "")
    from megalith.runtime.chat import render_chat

    messages = [{"role": "system", "content": options["system"]}] if options["system"] is not None else []
    text = render_chat(tokenizer(), [*messages, {"role": "user", "content": options["chat"]}])
    return tokenizer().encode(text, add_special_tokens=False)


def _finish_reason(last: int | None, eos_token_ids: list[int], ignore_eos: bool) -> str:
    return "stop" if last in eos_token_ids and not ignore_eos else "length"
