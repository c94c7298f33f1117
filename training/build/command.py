"""``monofacet bundle build``: make a bundle of your own model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from monofacet._tables import COLUMNS, help_text
from rich.console import Console
from rich.markup import escape

from services.bundle.manifest import NAME, NAME_RULE
from services.encoding.machine import usable_cores
from training.build.settings import KINDS, BuildSettings

DEFAULTS = BuildSettings(Path(), Path(), "")


def build(
    out: Annotated[Path, typer.Argument(help="The bundle's folder; replaced when the new one is whole.")],
    model: Annotated[
        str,
        typer.Option(help="Folder of an open_clip model, hf-hub:OWNER/NAME, or an open_clip name."),
    ],
    pretrained: Annotated[str, typer.Option(help="Tag of the weights, for an open_clip name.")] = "",
    revision: Annotated[str | None, typer.Option(help="Of the model on the hub.")] = None,
    pairs: Annotated[
        list[Path] | None,
        typer.Option(
            help="CSV, TSV, JSON lines, parquet, Arrow or webdataset tar of pairs, a folder of them, or of pictures "
            f"with a text beside each. Repeatable. Columns: {help_text(*COLUMNS)}."
        ),
    ] = None,
    max_bad_share: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Rows that cannot be used, of all: where there are more the build ends."
        ),
    ] = DEFAULTS.max_bad_share,
    embeddings: Annotated[
        Path | None,
        typer.Option(help="Finished embeddings of the same towers; --pairs then only gives thumbnails."),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="What a later run goes on from. Default: OUT.work beside OUT.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the bundle. Default: OUT's own name.")] = "",
    description: Annotated[str, typer.Option(help="For people.")] = "",
    licence: Annotated[
        list[str] | None, typer.Option(help="SPDX name of what the bundle holds. Repeatable.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Wording of each caption, {} standing for it. Repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float16 or float32: embeddings on disk.")] = DEFAULTS.dtype,
    shard_rows: Annotated[
        int, typer.Option(min=1, max=100_000, help="Pairs a shard: what a kill costs at most.")
    ] = DEFAULTS.shard_rows,
    device: Annotated[str, typer.Option(help="Of the towers: cpu or cuda.")] = DEFAULTS.device,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of one thread each. Default: the usable cores.")
    ] = None,
    features: Annotated[
        int, typer.Option(min=0, help="n of the autoencoders; 0 is 8 d, at least 1,024.")
    ] = DEFAULTS.features,
    k: Annotated[int, typer.Option(min=1, help="Features that describe one embedding.")] = DEFAULTS.k,
    steps: Annotated[
        int, typer.Option(min=0, help="Of each dictionary; 0 is --epochs passes, at least the recipe's own.")
    ] = DEFAULTS.steps,
    epochs: Annotated[float, typer.Option(min=0.01, help="Passes over the pairs.")] = DEFAULTS.epochs,
    kind: Annotated[
        list[str] | None, typer.Option(help=f"Dictionaries to make. Repeatable. Default: {', '.join(KINDS)}.")
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=3, help="Trainings of each kind; two and more tell their stability.")
    ] = DEFAULTS.seeds,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = DEFAULTS.seed,
    fit_limit: Annotated[
        int, typer.Option(min=64, help="Pairs that train the dictionaries, at most.")
    ] = DEFAULTS.fit_limit,
    table_limit: Annotated[
        int, typer.Option(min=16, help="Held-out pairs that make the tables, at most.")
    ] = DEFAULTS.table_limit,
    evaluation_limit: Annotated[
        int, typer.Option(min=16, help="Pairs that judge, of validation and of test, at most.")
    ] = DEFAULTS.evaluation_limit,
    bias: Annotated[
        bool | None, typer.Option(help="Calibrate gender bias. Default: where enough pairs say a gender.")
    ] = None,
    defense: Annotated[
        bool | None, typer.Option(help="Calibrate the defence. Default: where images can be read.")
    ] = None,
    resamples: Annotated[
        int, typer.Option(min=20, help="Of intervals and matched nulls of the bias study.")
    ] = DEFAULTS.resamples,
    attack_images: Annotated[
        int, typer.Option(min=4, help="Images that are attacked, of validation and of test.")
    ] = DEFAULTS.attack_images,
    attack_steps: Annotated[
        int, typer.Option(min=1, help="Gradients an attacked image.")
    ] = DEFAULTS.attack_steps,
    thumbnails: Annotated[
        bool, typer.Option(help="Put small pictures of your images into the bundle.")
    ] = DEFAULTS.thumbnails,
    samples: Annotated[
        int, typer.Option(min=0, max=256, help="Test images that the bundle ships.")
    ] = DEFAULTS.samples,
    pipeline: Annotated[
        str, typer.Option(help="Folder of a diffusers pipeline, or hf-hub:OWNER/NAME.")
    ] = DEFAULTS.pipeline,
    pipeline_revision: Annotated[str | None, typer.Option(help="Of the pipeline on the hub.")] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Leave the pipeline where it is; the bundle has its hash.")
    ] = DEFAULTS.reference,
) -> None:
    """Build a bundle from an open_clip model and image-text pairs; run it again to go on after a stop."""
    unknown = sorted(set(kind or ()) - set(KINDS))
    if unknown:
        raise typer.BadParameter(f"no kind {', '.join(unknown)}; choose from {', '.join(KINDS)}")
    for value, known, option in (
        (dtype, ("float16", "float32"), "--dtype"),
        (device, ("cpu", "cuda"), "--device"),
    ):
        if value not in known:
            raise typer.BadParameter(f"{option} must be one of {', '.join(known)}")
    if any("{}" not in wording for wording in template or ()):
        raise typer.BadParameter("--template needs a {} where the caption goes")
    if name and NAME.fullmatch(name) is None:
        raise typer.BadParameter(f"--name {NAME_RULE}")
    if not pairs and embeddings is None:
        raise typer.BadParameter("give --pairs, or --embeddings of an earlier build")
    settings = BuildSettings(
        out=out,
        work=work or out.with_name(f"{out.name}.work"),
        model=model,
        pretrained=pretrained,
        revision=revision,
        pairs=tuple(pairs or ()),
        max_bad_share=max_bad_share,
        embeddings=embeddings,
        name=name,
        description=description,
        licences=tuple(licence or ()),
        templates=tuple(template or DEFAULTS.templates),
        dtype=dtype,
        shard_rows=shard_rows,
        device=device,
        workers=workers or usable_cores(),
        features=features,
        k=k,
        steps=steps,
        epochs=epochs,
        kinds=tuple(name for name in KINDS if name in (kind or KINDS)),
        seeds=seeds,
        seed=seed,
        fit_limit=fit_limit,
        table_limit=table_limit,
        evaluation_limit=evaluation_limit,
        bias=bias,
        defense=defense,
        resamples=resamples,
        attack_images=attack_images,
        attack_steps=attack_steps,
        thumbnails=thumbnails,
        samples=samples,
        pipeline=pipeline,
        pipeline_revision=pipeline_revision,
        reference=reference,
    )
    console = Console(stderr=True)
    # After the options were checked: importing torch takes seconds.
    from services.errors import MonofacetError
    from training.build.errors import BuildError
    from training.build.run import run

    try:
        run(settings, console)
    except (BuildError, MonofacetError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(3) from error
    except KeyboardInterrupt as stopped:
        console.print("stopped; the same command goes on from here")
        raise typer.Exit(130) from stopped
