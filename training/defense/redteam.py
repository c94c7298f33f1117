"""``monofacet redteam``: attack your own images against a bundle on this machine, and see what the defence makes of it.

Nothing leaves the process: attacks need the weights, and none is made over the wire. The report says how the towers
and the defence did on these images; see docs/defence.md for what that is worth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.bundle.load import Bundle
from services.defense import DefenseCalibration
from services.encoding.clip import build_clip
from services.encoding.images import ImagePreprocess, decode_image
from services.encoding.text_tower import TextTower
from services.encoding.texts import Tokenizer
from services.errors import MonofacetError
from training.defense.adaptive import Defended, adaptive, evasion
from training.defense.attacks import Loss, apgd, feature_matching, pgd, untargeted
from training.defense.calibrate import answered
from training.defense.corruptions import typographic
from training.defense.observe import Decoder, observe
from training.defense.victim import Victim, to_images, to_pixels

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
ATTACKS = ("pgd", "apgd", "match", "typographic", "adaptive")
# Pictures that gradients are held for at once: more would take memory by the size of the folder.
BATCH = 32
EMBEDDED_BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "emoji"


def redteam(
    images: Annotated[list[Path], typer.Argument(help="Image files and folders of images.")],
    bundle: Annotated[Path, typer.Option(help="Directory of the bundle to attack.")] = EMBEDDED_BUNDLE,
    attack: Annotated[
        list[str] | None, typer.Option("--attack", help=f"Any of {', '.join(ATTACKS)}. Default: all.")
    ] = None,
    epsilon: Annotated[
        list[int] | None,
        typer.Option("--epsilon", min=1, max=64, help="Budgets in pixel levels. Default: 4."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Gradients an image.")] = 20,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", help="What the images may show. Default: the bundle's labels."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Text that `match` and `typographic` aim at. Default: another label.")
    ] = None,
    second_look: Annotated[bool, typer.Option(help="Defend with a second look at each picture.")] = True,
    false_positive_rate: Annotated[
        float, typer.Option("--fpr", min=0.001, max=0.5, help="Operating point of the defence.")
    ] = 0.01,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.json and the attacked pictures, as PNG.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the starts and of the targets.")] = 0,
) -> None:
    """Attack your own images against a bundle on this machine, and report what the defence makes of it."""
    console = Console()
    names = list(attack or ATTACKS)
    unknown = sorted(set(names) - set(ATTACKS))
    if unknown:
        raise typer.BadParameter(f"no attack {', '.join(unknown)}; choose from {', '.join(ATTACKS)}")
    try:
        subject = Subject.open(bundle, find_images(images), label or (), second_look, false_positive_rate)
        settings = [
            (name, budget) for name in names for budget in ([0] if name == "typographic" else epsilon or [4])
        ]
        rows = [subject.report("none", 0, subject.pictures)]
        for name, budget in settings:
            attacked = subject.attack(name, budget, steps=steps, target=target, seed=seed)
            rows.append(subject.report(name, budget, attacked))
            if out is not None:
                save_pictures(out, name, budget, subject.files, attacked)
    except (MonofacetError, OSError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(3) from error
    show(console, subject, rows)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(
            json.dumps({"bundle": subject.bundle.id, "attacks": rows}, indent=1) + "\n"
        )
        console.print(f"report and pictures are in {escape(str(out))}")


def find_images(paths: list[Path]) -> list[Path]:
    """Return the image files that `paths`, files and folders, name.

    Raises
    ------
    OSError
        Where there is none.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"no such image: {path}")
    if not found:
        raise FileNotFoundError("no images to attack")
    return found


class Subject:
    """A bundle under attack, with the pictures to attack.

    Parameters
    ----------
    bundle : Bundle
        Verified.
    calibration : DefenseCalibration
        Of its defence.
    files : list of Path
        Where the pictures came from.
    pictures : float32 tensor, shape (B, 3, H, W)
        At the tower's size, in [0, 1].
    labels, texts : tuple of str and float32 tensor, shape (L, d)
        What the pictures may show.
    second_look, false_positive_rate
        How the defence is run.
    """

    def __init__(
        self,
        bundle: Bundle,
        calibration: DefenseCalibration,
        files: list[Path],
        pictures: torch.Tensor,
        labels: tuple[str, ...],
        texts: torch.Tensor,
        second_look: bool,
        false_positive_rate: float,
    ) -> None:
        self.bundle, self.calibration = bundle, calibration
        self.files, self.pictures = files, pictures
        self.labels, self.texts = labels, texts
        self.second_look, self.false_positive_rate = second_look, false_positive_rate
        self.victim = Victim(bundle)
        self.dictionary = bundle.dictionary(calibration.dictionary)
        self.decoder = Decoder.of(self.dictionary)
        # Nobody says what the pictures show, so what counts is whether the answer changes.
        self.truth = (self.victim.embed(pictures) @ texts.T).argmax(1)

    @classmethod
    def open(
        cls, path: Path, files: list[Path], labels: list[str] | tuple[()], second_look: bool, rate: float
    ) -> Subject:
        """Load the bundle and the pictures.

        Raises
        ------
        MonofacetError
            Where the bundle cannot be used, or a picture cannot be read.
        """
        bundle = Bundle.load(path)
        entry = bundle.manifest.defense
        if entry is None:
            raise MonofacetError("this bundle has no defence calibration: run python -m training.defense.run")
        calibration = DefenseCalibration.read(bundle.path / entry.config, bundle.path / entry.weights)
        fit = ImagePreprocess(bundle.clip_config).fit
        pictures = to_images(np.stack([np.asarray(fit(decode_image(file.read_bytes()))) for file in files]))
        chosen = tuple(labels) or calibration.labels
        units = embed_texts(bundle, chosen) if labels else torch.from_numpy(calibration.label_units)
        return cls(bundle, calibration, files, pictures, chosen, units, second_look, rate)

    def targets(self, target: str | None, seed: int) -> tuple[list[str], torch.Tensor]:
        """Return the text that each picture is to be taken for, and its embedding."""
        if target is not None:
            return [target] * len(self.pictures), embed_texts(self.bundle, (target,)).expand(
                len(self.pictures), -1
            )
        if len(self.labels) < 2:
            raise MonofacetError("give --target, or at least two labels")
        rng = np.random.default_rng(seed)
        moved = (self.truth.numpy() + rng.integers(1, len(self.labels), len(self.truth))) % len(self.labels)
        return [self.labels[i] for i in moved], self.texts[moved]

    def attack(self, name: str, budget: int, *, steps: int, target: str | None, seed: int) -> torch.Tensor:
        """Return the attacked pictures, as 8 bits a channel hold them."""
        if name == "typographic":
            return typographic(self.pictures, self.targets(target, seed)[0])
        methods: dict[str, Callable[..., torch.Tensor]] = {"apgd": apgd, "adaptive": adaptive}
        run = methods.get(name, pgd)
        aims = self.targets(target, seed)[1] if name == "match" else None
        # One for all pieces, and drawn from in order: a picture's start does not depend on how they are split.
        generator = torch.Generator().manual_seed(seed)
        chunks = []
        for start in range(0, len(self.pictures), BATCH):
            some = slice(start, start + BATCH)
            loss = self._loss(name, self.truth[some], None if aims is None else aims[some])
            moved = run(loss, self.pictures[some], budget / 255, steps=steps, generator=generator)
            chunks.append(to_images(to_pixels(moved)))
        return torch.cat(chunks)

    def _loss(self, name: str, truth: torch.Tensor, aims: torch.Tensor | None) -> Loss:
        """Return what an attack makes large, for the pictures that `truth` and `aims` are of."""
        if aims is not None:
            return feature_matching(self.victim, aims)
        if name == "adaptive":
            defended = Defended(
                self.victim, self.dictionary, self.calibration, self.second_look, self.false_positive_rate
            )
            return evasion(defended, self.texts, truth, weight=1.0)
        return untargeted(self.victim, self.texts, truth, self.victim.logit_scale)

    def report(self, name: str, budget: int, pictures: torch.Tensor) -> dict[str, Any]:
        """Return what the towers and the defence make of pictures, in all and one by one."""
        observed = observe(self.victim, self.dictionary, pictures)
        flagged, after, changed = answered(
            observed,
            self.calibration,
            self.decoder,
            second_look=self.second_look,
            false_positive_rate=self.false_positive_rate,
        )
        texts, truth = self.texts.numpy(), self.truth.numpy()
        before_label, after_label = (observed.unit @ texts.T).argmax(1), (after @ texts.T).argmax(1)
        kept = after_label == truth
        return {
            "attack": name,
            "epsilon": budget,
            "images": len(truth),
            "label_changed": float((before_label != truth).mean()),
            "flagged": float(flagged.mean()),
            "label_changed_after_filtering": float((~kept).mean()),
            "evaded": float((~kept & ~flagged).mean()),
            "pictures": [
                {
                    "file": str(file),
                    "label": self.labels[truth[i]],
                    "attacked": self.labels[before_label[i]],
                    "filtered": self.labels[after_label[i]],
                    "flagged": bool(flagged[i]),
                    "features_changed": int(changed[i]),
                }
                for i, file in enumerate(self.files)
            ],
        }


def embed_texts(bundle: Bundle, texts: tuple[str, ...]) -> torch.Tensor:
    """Return unit embeddings of texts, float32 (L, d)."""
    config = bundle.clip_config
    tower = TextTower(build_clip(config, bundle.clip_weights))
    tokens = torch.from_numpy(Tokenizer(config).tokenize(list(texts), truncate=True))
    with torch.inference_mode():
        raw = torch.cat([tower(chunk) for chunk in tokens.split(32)])
    return torch.nn.functional.normalize(raw, dim=-1).clone()


def save_pictures(out: Path, name: str, budget: int, files: list[Path], pictures: torch.Tensor) -> None:
    """Write attacked pictures to a folder named after the attack."""
    folder = out / (f"{name}-{budget}" if budget else name)
    folder.mkdir(parents=True, exist_ok=True)
    width = max(1, math.ceil(math.log10(len(files) + 1)))
    for i, (file, pixels) in enumerate(zip(files, to_pixels(pictures), strict=True)):
        # Numbered: two folders may hold files of one name.
        Image.fromarray(pixels).save(folder / f"{i:0{width}d}-{file.stem}.png")


def show(console: Console, subject: Subject, rows: list[dict[str, Any]]) -> None:
    """Print the report."""
    looks = "two looks" if subject.second_look else "one look"
    table = Table(
        "attack", "epsilon", "label changed", "flagged", "changed after filtering", "changed and not flagged",
        title=f"{subject.bundle.id}: {len(subject.files)} images, {looks}, {subject.false_positive_rate:.1%} "
        "false positives",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row["attack"],
            f"{row['epsilon']}/255" if row["epsilon"] else "",
            *(
                f"{row[key]:.0%}"
                for key in ("label_changed", "flagged", "label_changed_after_filtering", "evaded")
            ),
        )
    console.print(table)
    console.print(
        "Labels are compared with what the tower says of the unattacked picture. `adaptive` knows the defence.",
        style="dim",
    )
