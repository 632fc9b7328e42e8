"""`megalith unpack`."""

from __future__ import annotations

from pathlib import Path

import click

from megalith.output import human_bytes, print_json, show_progress


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
@click.option("--no-progress", is_flag=True, help="Draw no progress bar.")
def unpack(file: Path, folder: Path, as_json: bool, no_progress: bool) -> None:
    """Write the checkpoint in FILE back into the new or empty folder DIR, for transformers and others to load."""
    from tqdm import tqdm

    import megalith
    from megalith.converter.unpack import unpack as write_checkpoint

    with megalith.open(file) as packed:
        total, hidden = packed.header.section("image").nbytes, not show_progress(not no_progress)
        with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="unpacking", disable=hidden) as bar:
            result = write_checkpoint(packed, folder, bar.update)
    if as_json:
        print_json({"folder": str(folder), **vars(result)})
        return
    click.echo(f"{folder}: {result.tensors} tensors, {human_bytes(result.nbytes)} in {len(result.files)} files")
    if result.converted:
        click.echo("the conversion had changed dtypes: these are the converted values, and config.json says so", err=True)
