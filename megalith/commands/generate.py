"""`megalith generate`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from megalith.output import print_json


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="Text to continue.")
@click.option("--chat", metavar="TEXT", help="A user's message, put into the model's chat template.")
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
@click.option("--json", "as_json", is_flag=True, help="Print prompt ids, token ids, text and timings as JSON.")
def generate(
    file: Path,
    prompt: str | None,
    chat: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int | None,
    ignore_eos: bool,
    backend: str,
    no_cuda_graph: bool,
    as_json: bool,
) -> None:
    """Generate text from the packed file FILE; it streams to standard output as it comes."""
    if (prompt is None) == (chat is None):
        raise click.UsageError("give one of --prompt and --chat")
    if system is not None and chat is None:
        raise click.UsageError("--system goes with --chat")
    import secrets

    import megalith
    from megalith.runtime.chat import render_chat
    from megalith.runtime.sampler import SamplingParameters

    seed = secrets.randbits(32) if seed is None else seed
    parameters = SamplingParameters(temperature, top_k, top_p, min_p, seed)
    begun = time.perf_counter()
    engine = megalith.load(file, backend=backend, use_graphs=not no_cuda_graph)
    loaded = time.perf_counter()
    if chat is not None:
        system_messages = [{"role": "system", "content": system}] if system is not None else []
        text = render_chat(engine.tokenizer, [*system_messages, {"role": "user", "content": chat}])
        prompt_ids = engine.tokenizer.encode(text, add_special_tokens=False)
    else:
        prompt_ids = engine.tokenizer.encode(prompt or "")
    tokens, times = [], [time.perf_counter()]
    for token in engine.generate_tokens(prompt_ids, parameters, max_tokens=max_tokens, ignore_eos=ignore_eos):
        tokens.append(token)
        times.append(time.perf_counter())
        if not as_json:
            click.echo(token.text, nl=False)
    if not as_json:
        click.echo()
        return
    print_json(
        {
            "prompt_ids": prompt_ids,
            "ids": [token.id for token in tokens],
            "text": "".join(token.text for token in tokens),
            "finish_reason": _finish_reason(tokens[-1].id if tokens else None, engine.config.eos_token_ids, ignore_eos),
            "seed": seed,
            "load_seconds": loaded - begun,
            "prefill_seconds": times[1] - times[0] if tokens else None,
            "decode_tokens_per_second": (len(tokens) - 1) / (times[-1] - times[1]) if len(tokens) > 1 else None,
        }
    )


def _finish_reason(last: int | None, eos_token_ids: list[int], ignore_eos: bool) -> str:
    return "stop" if last in eos_token_ids and not ignore_eos else "length"
