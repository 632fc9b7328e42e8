"""`megalith bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megalith.output import TRACE_HELP, print_traced

if TYPE_CHECKING:
    from megalith.runtime.bench import Plan
    from megalith.runtime.trace import Trace


def _pairs(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[tuple[int, int]]:
    """BATCH:CONTEXT as numbers."""
    found = []
    for value in values:
        batch, _, positions = value.partition(":")
        if not (batch.isdigit() and positions.isdigit() and int(batch) and int(positions)):
            raise click.BadParameter(f"{value}: give BATCH:CONTEXT, such as 1:128")
        found.append((int(batch), int(positions)))
    return found


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--decode", multiple=True, callback=_pairs, metavar="BATCH:CONTEXT", default=("1:128", "1:2048", "8:512", "32:512"),
    show_default=True, help="Decode steps to time; may be given several times.",
)  # fmt: skip
@click.option(
    "--prefill", multiple=True, type=click.IntRange(1), metavar="TOKENS", default=(512, 2048), show_default=True,
    help="Prompt lengths to time; may be given several times.",
)  # fmt: skip
@click.option("--no-cuda-graph", is_flag=True, help="Launch every kernel of a decode step by itself.")
@click.option(
    "--trace", "trace_path", type=click.Path(path_type=Path), metavar="OUT.json",
    help=TRACE_HELP.format(
        what="of the host, and of every kernel of one prefill or four decode steps that follow each measurement"
    ),
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON.")
def bench(
    file: Path,
    decode: list[tuple[int, int]],
    prefill: tuple[int, ...],
    no_cuda_graph: bool,
    trace_path: Path | None,
    as_json: bool,
) -> None:
    """Time loading, prefill and decode of the packed file FILE on this machine's GPU: medians, sampling included."""
    from megalith.runtime.bench import Plan
    from megalith.runtime.trace import tracing

    with tracing(trace_path) as trace:
        report = _measured(file, Plan(decode, list(prefill), not no_cuda_graph), trace, as_json)
    print_traced(report if as_json else None, trace_path)


def _measured(file: Path, plan: Plan, trace: Trace | None, as_json: bool) -> dict[str, Any]:
    """Prints a row per figure unless JSON is wanted; what JSON says."""
    from megalith.runtime.bench import Bench

    measured = Bench(file, plan, trace)
    results = []
    if not as_json:
        click.echo(
            f"{measured.device}\n{'work':8} {'batch':>5} {'context':>7} {'ms':>9} {'tokens/s':>10} {'GB/s':>7} {'% nominal':>9}"
        )
    for result in measured.results():
        results.append(result.to_dict())
        if not as_json:
            cells = (result.batch, result.context, result.ms, result.tokens_per_s, result.gbytes_per_s, result.percent_nominal)
            click.echo(f"{result.work:8} " + " ".join(_cell(value, width) for value, width in zip(cells, _WIDTHS, strict=True)))
    return {"gpu": measured.device, "results": results}


_WIDTHS = (5, 7, 9, 10, 7, 9)


def _cell(value: float | None, width: int) -> str:
    if value is None:
        return "-".rjust(width)
    return f"{value:{width}d}" if isinstance(value, int) else f"{value:{width}.{1 if value >= 100 else 3}f}"
