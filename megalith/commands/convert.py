"""`megalith convert`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from megalith.output import human_bytes, print_json, show_progress


@click.command()
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("target", metavar="DST.lith", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Stored dtype. auto keeps BF16 and FP16 as they are, and FP32 matrices as BF16 if that loses nothing.",
)
@click.option(
    "--experts",
    type=click.Choice(["keep", "mxfp4"]),
    default="keep",
    show_default=True,
    help="keep stores experts as they are; mxfp4 quantises them to 4 bits.",
)
@click.option(
    "--linear",
    type=click.Choice(["keep", "mxfp4"]),
    default="keep",
    show_default=True,
    help="The same for attention and dense MLP matrices. Embeddings, head, routers and vectors always stay.",
)
@click.option(
    "--scale",
    type=click.Choice(["ocp", "search"]),
    default="ocp",
    show_default=True,
    help="Scale of a quantised block: by the OCP rule, or the one with the least squared error of three.",
)
@click.option("--max-seq-len", type=click.IntRange(1), help="Longest context the file is for; default: the model's own.")
@click.option("--jobs", type=click.IntRange(1, 64), help="Threads to pack with; default: one more than processors, at most 16.")
@click.option("--dry-run", is_flag=True, help="Print the exact size, sections and padding; write nothing.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted conversion to DST stopped.")
@click.option("--force", is_flag=True, help="Replace DST if it exists.")
@click.option("--allow-nonfinite", is_flag=True, help="Keep NaN and infinite weights instead of failing.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest, with sha256, as JSON.")
@click.option("--no-progress", is_flag=True, help="Draw no progress bar.")
def convert(
    source: Path,
    target: Path,
    dtype: str,
    experts: str,
    linear: str,
    scale: str,
    max_seq_len: int | None,
    jobs: int | None,
    dry_run: bool,
    resume: bool,
    force: bool,
    allow_nonfinite: bool,
    as_json: bool,
    no_progress: bool,
) -> None:
    """Pack the checkpoint folder SRC (config.json, safetensors, tokenizer) into the one file DST.lith.

    The same checkpoint and options give the same bytes on any machine. DST appears only when it is complete.
    """
    from megalith.converter import convert as conversion
    from megalith.converter.plan import Options, make_plan, plan_summary
    from megalith.converter.source import Checkpoint

    options = Options(dtype, max_seq_len, allow_nonfinite, experts, linear, scale)
    if dry_run:
        with Checkpoint(source) as checkpoint:
            summary = plan_summary(make_plan(checkpoint, options))
        print_json({"dry_run": True, **summary}) if as_json else _print_plan(summary)
        return
    bar = _Bar(show_progress(not no_progress))
    with bar:
        result = conversion.convert(source, target, options, jobs=jobs, resume=resume, force=force, on_plan=bar.start)
    if as_json:
        print_json(conversion.manifest(result, target))
        return
    _print_losses(result.total_loss, dtype)
    if (sqnr := result.quantisation_loss.sqnr_db) is not None:
        click.echo(f"weights were quantised to MXFP4: {sqnr:.1f} dB signal to noise over all of them", err=True)
    state = "is already complete" if result.already_complete else "written"
    click.echo(f"{target}: {human_bytes(result.plan.file_bytes)} {state}, {len(result.plan.index.tensors)} tensors")


class _Bar:
    """A tqdm bar over the bytes of the device image, from any thread."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._bar: Any = None

    def start(self, plan: Any) -> Callable[[int], None]:
        from tqdm import tqdm

        total = sum(extent.nbytes for extent in plan.extents[:-3])
        self._bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="packing", disable=not self._shown)
        return self._update

    def _update(self, count: int) -> None:
        self._bar.update(count)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _print_losses(loss: Any, dtype: str) -> None:
    if loss.rounded:
        click.echo(
            f"{loss.rounded} values were rounded to {dtype}, {loss.flushed} of them to zero; "
            f"largest error {loss.max_abs_error:.3g}",
            err=True,
        )
    if loss.nonfinite:
        click.echo(f"{loss.nonfinite} values are NaN or infinite", err=True)


def _print_plan(summary: dict[str, Any]) -> None:
    click.echo(f"{summary['architecture']}: {summary['tensors']} tensors in {summary['blobs']} blobs")
    click.echo(f"file      {summary['file_bytes']:>16,} bytes")
    click.echo(f"weights   {summary['weights_bytes']:>16,} bytes")
    share = 100 * summary["padding_bytes"] / max(1, summary["weights_bytes"])
    click.echo(f"padding   {summary['padding_bytes']:>16,} bytes  ({share:.2f} % of the weights)")
    for section in summary["sections"]:
        click.echo(f"  {section['name']:<10} offset {section['offset']:>16,}  {section['bytes']:>16,} bytes")
    for name in summary["ignored_tensors"]:
        click.echo(f"  not stored: {name}")
