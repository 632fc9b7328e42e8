"""`megalith verify`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from megalith.output import human_bytes, print_json, show_progress

_SHOWN = 20


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--against", metavar="SRC", type=click.Path(path_type=Path), help="Also compare every bit with this checkpoint.")
@click.option("--jobs", type=click.IntRange(1, 64), help="Processes; default: one more than processors, at most 16.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--no-progress", is_flag=True, help="Draw no progress bar.")
def verify(file: Path, against: Path | None, jobs: int | None, as_json: bool, no_progress: bool) -> int:
    """Check every byte of FILE against its checksums; names tensor and page of what is broken, and exits with 1."""
    from tqdm import tqdm

    import megalith
    from megalith.converter.against import compare_with_checkpoint
    from megalith.converter.convert import default_jobs
    from megalith.format.errors import EXIT_DIFFERENT, printable
    from megalith.format.verify import verify_checksums

    jobs = jobs or default_jobs()
    with megalith.open(file) as packed:
        total = packed.file_bytes * (2 if against else 1)
        hidden = not show_progress(not no_progress)
        with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="verifying", disable=hidden) as bar:
            begun = time.perf_counter()
            broken = verify_checksums(packed, jobs, bar.update)
            seconds = time.perf_counter() - begun
            if not broken:
                packed.check_rest()
            mismatches = compare_with_checkpoint(packed, against, jobs, bar.update) if against else []
        nbytes = packed.file_bytes
        rounded = sum(record.loss.rounded for record in packed.records) if not broken else None
    if as_json:
        print_json(
            {
                "ok": not broken and not mismatches,
                "file_bytes": nbytes,
                "checksum_seconds": seconds,
                "broken_chunks": [vars(chunk) for chunk in broken],
                "against": str(against) if against else None,
                "rounded": rounded,
                "mismatches": [vars(mismatch) for mismatch in mismatches],
            }
        )
    else:
        lines = [chunk.describe() for chunk in broken] + [f"{m.name}: {m.detail}" for m in mismatches]
        for line in lines[:_SHOWN]:
            click.echo(f"{file}: {line}")
        if len(lines) > _SHOWN:
            click.echo(f"{file}: and {len(lines) - _SHOWN} more")
        if not lines:
            kept = "bit by bit" if not rounded else f"as it was converted, which rounded {rounded:,} values"
            compared = f", equal to {printable(against)} {kept}" if against else ""
            click.echo(f"{file}: {human_bytes(nbytes)} match their checksums{compared}")
    return EXIT_DIFFERENT if broken or mismatches else 0
