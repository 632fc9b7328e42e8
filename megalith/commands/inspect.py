"""`megalith inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megalith.output import human_bytes, print_json, show_progress

if TYPE_CHECKING:
    from megalith.format.reader import PackedFile

View = tuple[str, Any, list[str]]  # key of the JSON form, its value, the lines of the text form


def _position(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """The two integers of "R,C"."""
    if value is None:
        return None
    row, comma, column = value.partition(",")
    if not (comma and row.isdecimal() and column.isdecimal() and len(value) < 40):
        raise click.BadParameter("must be a row block and a page column, such as 0,0", ctx, param)
    return int(row), int(column)


@click.command()
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON; goes with every other option.")
@click.option("--tree", is_flag=True, help="Tensors by module, and which of them share a blob and how.")
@click.option("--tensor", metavar="NAME", help="One tensor: its place and the statistics of its values.")
@click.option("--tile", metavar="R,C", callback=_position, help="With --tensor: the page of row block R and page column C.")
@click.option("--hex", "as_hex", is_flag=True, help="With --tile: every value beside its raw bytes.")
@click.option("--stats", is_flag=True, help="Statistics of every tensor; reads the whole file.")
@click.option("--experts", is_flag=True, help="Where the matrices of each expert lie.")
@click.option(
    "--usage",
    type=click.Path(path_type=Path),
    metavar="LOG",
    help='With --experts: mark how often each was chosen. LOG has lines {"layer": 3, "expert": 17, "count": 4}.',
)
@click.option("--memory", is_flag=True, help="The device memory that running the file takes.")
@click.option("--context", type=click.IntRange(1), help="With --memory: positions of a sequence; default: all the file is for.")
@click.option("--batch", type=click.IntRange(1, 1 << 20), help="With --memory: sequences at a time; default 1.")
@click.option(
    "--gpu-memory",
    metavar="GIB",
    type=click.FloatRange(0, 1 << 20, min_open=True),
    help="With --memory: GiB of device memory to fill; the KV cache takes what is left.",
)
@click.option(
    "--heatmap",
    type=click.Path(path_type=Path),
    metavar="OUT.html",
    help="Write pictures of a tensor's magnitudes and of the file's layout; --tensor chooses the tensor.",
)
def inspect(file: Path, as_json: bool, **options: Any) -> None:
    """Show what the packed file FILE holds and how it is laid out; without options a summary and the table of tensors.

    Shows what is stored and checks no checksums: `megalith verify` does.
    """
    _check_options(options)
    from megalith.format.reader import PackedFile

    with PackedFile(file) as packed:
        views = _views(packed, options) or _default_views(packed, as_json)
    if as_json:
        print_json({"path": str(file), **{key: value for key, value, _ in views}})
        return
    click.echo("\n\n".join("\n".join(lines) for _, _, lines in views))


def _check_options(options: dict[str, Any]) -> None:
    for name, needed, given in (
        ("--tile", "--tensor", options["tile"] is not None and options["tensor"] is None),
        ("--hex", "--tile", options["as_hex"] and options["tile"] is None),
        ("--usage", "--experts", options["usage"] is not None and not options["experts"]),
        ("--context", "--memory", options["context"] is not None and not options["memory"]),
        ("--batch", "--memory", options["batch"] is not None and not options["memory"]),
        ("--gpu-memory", "--memory", options["gpu_memory"] is not None and not options["memory"]),
    ):
        if given:
            raise click.UsageError(f"{name} goes with {needed}")
    if options["heatmap"] is not None and options["heatmap"].suffix not in (".html", ".htm"):
        raise click.UsageError("--heatmap: the name of the page must end with .html")


def _default_views(packed: PackedFile, as_json: bool) -> list[View]:
    from megalith.inspection.summary import summary, summary_text
    from megalith.inspection.table import source_rows, sources_text, table_text, tensor_columns, tensor_rows

    data, sources, columns = summary(packed), source_rows(packed), tensor_columns(packed)
    if as_json:
        return [("summary", data, []), ("sources", sources, []), ("tensors", tensor_rows(columns), [])]
    views: list[View] = [("summary", data, summary_text(packed.path, data))]
    if sources:
        views.append(("sources", sources, sources_text(sources)))
    return [*views, ("tensors", None, [table_text(columns)])]


def _views(packed: PackedFile, options: dict[str, Any]) -> list[View]:
    """The views that options ask for; each module is imported when its view is wanted."""
    views: list[View] = []
    if options["tree"]:
        from megalith.inspection.tree import tree, tree_text

        data = tree(packed)
        views.append(("tree", data, tree_text(data)))
    if options["tensor"] is not None:
        views += _tensor_views(packed, options["tensor"], options["tile"], options["as_hex"])
    if options["stats"]:
        from megalith.inspection.statistics import all_statistics, all_statistics_text

        rows = all_statistics(packed, show_progress(True))
        views.append(("stats", rows, all_statistics_text(rows)))
    if options["experts"]:
        from megalith.inspection.experts import experts_text, experts_view

        found = experts_view(packed, options["usage"])
        views.append(("experts", found, experts_text(found)))
    if options["memory"]:
        from megalith.inspection.memory import memory, memory_text

        gib = options["gpu_memory"]
        plan = memory(packed, options["context"], options["batch"] or 1, None if gib is None else int(gib * 2**30))
        views.append(("memory", plan, memory_text(plan)))
    if options["heatmap"] is not None:
        from megalith.inspection.heatmap import write_heatmap

        written = write_heatmap(packed, options["tensor"], options["heatmap"])
        text = f"{written['path']}: {written['tensor']}, {human_bytes(written['bytes'])} written"
        views.append(("heatmap", written, [text]))
    return views


def _tensor_views(packed: PackedFile, name: str, position: tuple[int, int] | None, as_hex: bool) -> list[View]:
    from megalith.inspection.tensor import find_tensor, is_source, source_entry, source_text, tensor_entry, tensor_text
    from megalith.inspection.tile import tile, tile_text

    if is_source(packed, name) and position is None:
        held = source_entry(packed, name)
        return [("source", held, source_text(held))]
    tensor = find_tensor(packed, name)
    entry = tensor_entry(packed, tensor)
    views: list[View] = [("tensor", entry, tensor_text(entry))]
    if position is not None:
        page = tile(packed, tensor, *position)
        views.append(("tile", page, tile_text(page, as_hex)))
    return views
