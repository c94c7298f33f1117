"""``monofacet generate``."""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from monofacet import _exceptions as exceptions
from monofacet._types import (
    GeneratedImage,
    GenerateOptions,
    GenerationEvent,
    GenerationProgress,
    GenerationResult,
)
from monofacet.cli._edits import (
    Attribute,
    Delta,
    Dictionary,
    Dose,
    Feature,
    FromImage,
    FromText,
    Label,
    Quantile,
    Scale,
    Strength,
    attributes,
    edits,
)
from monofacet.cli._grid import grid
from monofacet.cli._inputs import Truncate
from monofacet.cli._out import STDOUT, check_folder, check_out, write_out
from monofacet.cli._session import FAILED, Session, connected, error_as_dict, print_json


@connected
def generate(
    session: Session,
    prompt: Annotated[str, typer.Argument(help="What to draw.")] = "",
    out: Annotated[
        Path,
        typer.Option(
            help="PNG to write: one image as the server made it, several as a grid; - for standard output."
        ),
    ] = Path("generated.png"),
    folder: Annotated[
        Path | None, typer.Option(help="Also write every image by itself into this folder.")
    ] = None,
    num_images: Annotated[int | None, typer.Option("-n", "--images", min=1, help="Images to make.")] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Seed of an image; several for several. With --images the first of a run."),
    ] = None,
    negative: Annotated[str, typer.Option(help="What to lead away from.")] = "",
    image: Annotated[
        Path | None, typer.Option(help="Picture that conditions the images beside the prompt.")
    ] = None,
    from_image: FromImage = None,
    from_text: FromText = None,
    quantile: Quantile = None,
    scale: Scale = None,
    label: Label = None,
    feature: Feature = None,
    strength: Strength = 1.0,
    dictionary: Dictionary = "",
    path: Annotated[str | None, typer.Option(help="Way of the edit: embedding or prompt.")] = None,
    contrastive: Annotated[
        bool, typer.Option(help="Edit the unconditional side of guidance too, the other way.")
    ] = False,
    delta: Delta = None,
    attribute: Attribute = None,
    dose: Dose = None,
    twin: Annotated[bool, typer.Option(help="Also make each image without the edit, beside it.")] = False,
    like: Annotated[
        Path | None, typer.Option(help="Make this PNG again, from the request that it carries.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=1, max=50, help="Scale of guidance; 1 is none.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Pixels.")] = None,
    truncate: Truncate = False,
) -> None:
    """Make images from a text, steered by features if an edit is given.

    An edit is features (--label or --feature) and a target (--from-image, --from-text, --quantile or --scale), or an
    attribute of the bundle (--attribute).
    """
    check_out(session, out)
    check_folder(folder)
    if like is not None:
        result = _watched(session, lambda told: session.client.generate_like(like, on_event=told))
    else:
        options: GenerateOptions = {
            "negative_prompt": negative,
            "image": image,
            "edits": edits(from_image, from_text, quantile, scale, label, feature, strength),
            "dictionary": dictionary,
            "path": path,  # type: ignore[typeddict-item]  # checked where the request is made
            "contrastive": contrastive,
            "delta": delta,
            "attributes": attributes(attribute),
            "dose": dose,
            "seeds": _seeds(seed, num_images),
            "steps": steps,
            "guidance": guidance,
            "height": height,
            "width": width,
            "unsteered": twin,
            "truncate": truncate,
        }
        result = _watched(session, lambda told: session.client.generate(prompt, on_event=told, **options))
    made = [made for made in (*result.images, *result.twins) if made.ok]
    if made:
        _write(result, made, out, folder)
    _report(session, result, out if made else None)
    if len(made) < len(result.images) + len(result.twins):
        raise typer.Exit(FAILED)


def _seeds(seeds: list[int] | None, num_images: int | None) -> list[int]:
    """Return one seed an image: those given, or a run from the one given or drawn."""
    if seeds and (num_images is None or len(seeds) == num_images):
        return seeds
    if seeds and len(seeds) > 1:
        raise exceptions.InputError(f"{len(seeds)} seeds for {num_images} images")
    first = seeds[0] if seeds else secrets.randbelow(2**31)
    return list(range(first, first + (num_images or 1)))


def _watched(
    session: Session, run: Callable[[Callable[[GenerationEvent], None]], GenerationResult]
) -> GenerationResult:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=session.progress, transient=True, disable=session.as_json) as progress:
        task = progress.add_task("waiting", total=1.0)

        def told(event: GenerationEvent) -> None:
            if isinstance(event, GenerationProgress):
                description = "waiting" if event.waiting == len(event.steps) else "generating"
                progress.update(task, completed=event.fraction, description=description)

        return run(told)


def _write(result: GenerationResult, made: list[GeneratedImage], out: Path, folder: Path | None) -> None:
    if len(made) == 1:
        write_out(out, made[0].data)
    else:
        rows = [result.images] + ([result.twins] if result.twins else [])
        sheet = io.BytesIO()
        grid([[one.image if one.ok else None for one in row] for row in rows]).save(sheet, "PNG")
        write_out(out, sheet.getvalue())
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for one in made:
                twin = "-unsteered" if one.unsteered else ""
                (folder / f"{one.index:02d}-seed-{one.seed}{twin}.png").write_bytes(one.data)
    except OSError as error:
        raise exceptions.InputError(f"cannot write {error.filename}: {error.strerror}") from error


def _report(session: Session, result: GenerationResult, out: Path | None) -> None:
    images = [*result.images, *result.twins]
    if session.as_json:
        print_json(
            {
                "out": None if out is None else str(out),
                "bundle": result.bundle,
                "images": [_as_dict(image) for image in images],
            }
        )
        return
    table = Table("image", "seed", "steering", "seconds", highlight=True)
    for image in images:
        name = f"{image.index}{' unsteered' if image.unsteered else ''}"
        if image.error is not None:
            table.add_row(name, str(image.seed), f"[red]{escape(image.error.message)}[/]", "")
            continue
        seconds = f"{image.timings.queue:.1f} + {image.timings.inference:.1f}"
        table.add_row(name, str(image.seed), f"{image.delta:.3f}" if image.delta else "-", seconds)
    session.console.print(table)
    if out is not None and out != STDOUT:
        session.console.print(f"written to {escape(str(out))}")


def _as_dict(image: GeneratedImage) -> dict[str, Any]:
    described = {
        "index": image.index,
        "unsteered": image.unsteered,
        "seed": image.seed,
        "delta": image.delta,
        "dose": image.dose,
        "queue": image.timings.queue,
        "inference": image.timings.inference,
    }
    return described if image.error is None else {**described, "error": error_as_dict(image.error)}
