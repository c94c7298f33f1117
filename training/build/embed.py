"""Embed pairs into a store, shard by shard; a shard that is there is not made again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from services.encoding.clip import build_clip, read_clip_config, read_logit_scale, tower_fingerprint
from services.encoding.images import ImagePreprocess, decode_image
from services.encoding.texts import Tokenizer
from services.encoding.torch_backend import TorchTowers
from services.errors import ImageError
from training.build.bad_rows import BAD_ROWS, check_bad_share, write_bad_rows
from training.build.errors import BuildError
from training.build.pairs import BadRow, ImageTextPair, Source, bad_row
from training.build.progress import Reporter
from training.build.selection import PEOPLE, PEOPLE_FILE, PROMPTS, Selection
from training.build.settings import BuildSettings
from training.build.sources import open_sources
from training.build.store import ShardEntry, Store, StoreKey
from training.build.workers import run_all
from training.towers.embed import CONFIG_FILE, WEIGHTS_FILE

# The towers' largest piece: more at once is not faster on a CPU.
BATCH = 32


@dataclass(frozen=True)
class Task:
    """One shard to make: rows `start` to `stop` of a source."""

    name: str
    source: int
    start: int
    stop: int


class Embedder:
    """The towers of a build.

    Parameters
    ----------
    clip : Path
        Folder of config and weights.
    device : str
        "cpu" or "cuda".
    """

    def __init__(self, clip: Path, device: str = "cpu") -> None:
        self.config = read_clip_config(clip / CONFIG_FILE)
        model = build_clip(self.config, clip / WEIGHTS_FILE)
        self.towers = TorchTowers(model, self.config, device=device)
        self.preprocess = ImagePreprocess(self.config)
        self._tokenizer = Tokenizer(self.config)

    def images(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return unit embeddings, (n, d), and norms, (n,), of preprocessed images."""
        empty = np.zeros((0, self.config.embed_dim), np.float32), np.zeros(0, np.float32)
        found = [
            self.towers.encode_images(np.stack(images[i : i + BATCH])) for i in range(0, len(images), BATCH)
        ]
        return (
            np.concatenate([empty[0], *(f.unit for f in found)]),
            np.concatenate([empty[1], *(f.norm for f in found)]),
        )

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return unit embeddings, (n, d); texts that are too long are cut."""
        if not texts:
            return np.zeros((0, self.config.embed_dim), np.float32)
        return self.towers.encode_texts(self._tokenizer.tokenize(texts, truncate=True)).unit

    def wordings(self, captions: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """Return unit embeddings of captions in every template, (templates, n, d)."""
        distinct, where = np.unique(np.array(captions, dtype=object), return_inverse=True)
        units = [self.texts([template.replace("{}", c) for c in distinct]) for template in templates]
        return np.stack(units)[:, where]


@cache
def embedder(clip: Path, device: str) -> Embedder:
    """Return the towers of a folder, loaded once a process."""
    return Embedder(clip, device)


@cache
def sources(paths: tuple[Path, ...]) -> list[Source]:
    """Return the sources, indexed once a process."""
    return open_sources(paths)


def store_key(clip: Path, templates: tuple[str, ...], dtype: str, device: str) -> StoreKey:
    """Return the key of a store for these towers."""
    return StoreKey(
        fingerprint=tower_fingerprint(clip / CONFIG_FILE, clip / WEIGHTS_FILE),
        templates=templates,
        dtype=dtype,
        backend="torch",
        device=device,
        precision="f32",
        embed_dim=read_clip_config(clip / CONFIG_FILE).embed_dim,
        logit_scale=read_logit_scale(clip / WEIGHTS_FILE),
    )


def plan(opened: Sequence[Source], shard_rows: int) -> list[Task]:
    """Deal the rows of all sources into shards; bad rows count, so that a shard's place never depends on them."""
    return [
        Task(f"{number:03d}-{start // shard_rows:06d}", number, start, min(start + shard_rows, len(source)))
        for number, source in enumerate(opened)
        for start in range(0, len(source), shard_rows)
    ]


def make_shard(paths: tuple[Path, ...], clip: Path, store: Store, task: Task) -> ShardEntry:
    """Embed the rows of one shard and write it; the unit of work of a process."""
    source = sources(paths)[task.source]
    towers = embedder(clip, store.key.device)
    # Before the rows are read: what changes meanwhile is made again.
    digest = source.digest(task.start, task.stop)
    kept: list[ImageTextPair] = []
    bad: list[BadRow] = []
    units: list[np.ndarray] = []
    norms: list[np.ndarray] = []
    pixels: list[np.ndarray] = []

    def run() -> None:
        unit, norm = towers.images(pixels)
        units.append(unit)
        norms.append(norm)
        pixels.clear()

    for item in source.read(task.start, task.stop):
        if isinstance(item, BadRow):
            bad.append(item)
            continue
        try:
            pixels.append(towers.preprocess(decode_image(item.image)))
        except ImageError as error:
            bad.append(bad_row(item.row, item.key, str(error)))
            continue
        # Without its bytes: a shard's images together may not fit in memory.
        kept.append(replace(item, image=b""))
        if len(pixels) == BATCH:
            run()
    run()
    entry = ShardEntry(
        task.name, digest, len(kept), [[source.name, row.row, row.key, row.reason] for row in bad]
    )
    texts = towers.wordings([pair.caption for pair in kept], store.key.templates)
    store.write(entry, np.concatenate(units), texts, _columns(source.name, kept, np.concatenate(norms)))
    return entry


def _columns(source: str, pairs: Sequence[ImageTextPair], norms: np.ndarray) -> dict[str, list]:
    columns: dict[str, list] = {"source": [source] * len(pairs)}
    for name in ("row", "key", "caption", "gender", "profession", "label", "group", "split"):
        columns[name] = [getattr(pair, name) for pair in pairs]
    return {**columns, "image_norm": norms.tolist()}


def missing(store: Store, opened: Sequence[Source], tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks whose shard is not there, or was made from other rows."""
    return [t for t in tasks if not store.has(t.name, opened[t.source].digest(t.start, t.stop))]


def fitting(paths: tuple[Path, ...], columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
    """Return which rows of a store are still where they were embedded from, bool [n].

    Parameters
    ----------
    paths : tuple of Path
        The sources.
    columns : mapping of str to sequence
        "source", "row" and "key" of the store's rows. The key is what tells: a table that was sorted anew has other
        images in its rows.
    """
    by_name = {source.name: source for source in sources(paths)}

    def fits(name: str, row: int, key: str) -> bool:
        source = by_name.get(name)
        return source is not None and row < len(source) and source.key(row) == key

    places = zip(columns["source"], columns["row"], columns["key"], strict=True)
    return np.array([fits(*place) for place in places], bool)


def read_images(paths: tuple[Path, ...], wanted: Sequence[tuple[str, int]]) -> dict[tuple[str, int], bytes]:
    """Read encoded images again, by source name and row; those that cannot be read any more are left out.

    Whether a row is still the same one `fitting` says.
    """
    by_name = {source.name: source for source in sources(paths)}
    found = {}
    # In order: images that a table holds are read by groups of rows.
    for name, row in sorted(set(wanted)):
        source = by_name.get(name)
        if source is None or row >= len(source):
            continue
        for item in source.read(row, row + 1):
            if isinstance(item, ImageTextPair):
                found[name, row] = item.image
    return found


def embed(settings: BuildSettings, reporter: Reporter) -> Store:
    """Return the embeddings of the pairs, or the finished ones that the settings name.

    Raises
    ------
    BuildError
        Where no pair can be used, or finished embeddings are of other towers or of other pairs.
    """
    clip = settings.work / "clip"
    key = store_key(clip, settings.templates, settings.dtype, settings.device)
    if settings.embeddings is not None:
        store = Store.open(settings.embeddings)
        if store.key.fingerprint != key.fingerprint:
            raise BuildError(f"{settings.embeddings} holds embeddings of other towers than {settings.model}")
        if settings.pairs:
            check_pairs(store, settings, reporter)
        return store
    opened = sources(settings.pairs)
    # What a table says is read in seconds, and embedding takes hours.
    broken = [[source.name, row.row, row.key, row.reason] for source in opened for row in source.broken()]
    write_bad_rows(broken, settings.work / BAD_ROWS)
    check_bad_share(broken, sum(len(source) for source in opened) - len(broken), settings)
    store = Store(settings.work / "embeddings" / key.digest(), key)
    tasks = plan(opened, settings.shard_rows)
    todo = missing(store, opened, tasks)
    total = sum(task.stop - task.start for task in tasks)
    with reporter.stage("embeddings", total) as stage:
        stage.advance(total - sum(task.stop - task.start for task in todo))
        arguments = [(settings.pairs, clip, store, task) for task in todo]
        # On a GPU one process is enough to keep it busy, and all that fits.
        run_all(_make_shard, arguments, 1 if settings.device == "cuda" else settings.workers, stage.advance)
    store.finish([task.name for task in tasks])
    bad = [row for entry in store.shards() for row in entry.bad]
    write_bad_rows(bad, settings.work / BAD_ROWS)
    good = sum(entry.rows for entry in store.shards())
    rows = len(bad) + good
    if bad:
        share = f"{len(bad) / rows:.1%}, at most {settings.max_bad_share:.1%} may be"
        reporter.say(f"{len(bad)} of {rows} rows were skipped ({share}); {settings.work / BAD_ROWS} says why")
    check_bad_share(bad, good, settings)
    return store


def check_pairs(store: Store, settings: BuildSettings, reporter: Reporter) -> None:
    """Tell how many pairs of finished embeddings have no picture in `--pairs`.

    Raises
    ------
    BuildError
        Where none has: hours of training would come before anyone sees it.
    """
    rows = store.rows()
    fits = fitting(settings.pairs, {name: rows[name].to_pylist() for name in ("source", "row", "key")})
    if not fits.any():
        raise BuildError(
            f"{settings.embeddings} was not made from these --pairs: none of its {len(fits)} rows is in a file of the "
            "same name, at the same place, with the same path or key"
        )
    if not fits.all():
        reporter.say(
            f"{(~fits).sum()} of {len(fits)} pairs of {settings.embeddings} are not where they were in --pairs: "
            "they go without a picture"
        )


def only_readable(selection: Selection, settings: BuildSettings) -> tuple[Selection, bool | str]:
    """Take the source from pairs that are no longer there, so that no picture of another pair is read for theirs.

    Returns
    -------
    selection : Selection
        Its column "source" is "" for those.
    readable : bool or str
        What stages that read pictures hang on: whether there are any, or where some are not, a hash of which.
    """
    if settings.embeddings is None or not settings.pairs:
        return selection, bool(settings.pairs)
    fits = fitting(settings.pairs, selection.columns)
    if fits.all():
        return selection, True
    columns = {**selection.columns, "source": np.where(fits, selection.columns["source"], "")}
    return replace(selection, columns=columns), hashlib.sha256(fits.tobytes()).hexdigest()


def _make_shard(
    paths: tuple[Path, ...], clip: Path, store: Store, task: Task, tell: Callable[[float], None]
) -> None:
    make_shard(paths, clip, store, task)
    tell(task.stop - task.start)


def with_people(store: Store, clip: Path, device: str) -> None:
    """Add the embeddings of the prompts of a woman and of a man to a store, float32 [2, prompts, d]."""
    path = store.folder / PEOPLE_FILE
    if path.exists():
        return
    towers = embedder(clip, device)
    people = np.stack([towers.texts([prompt.format(who) for prompt in PROMPTS]) for who in PEOPLE])
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        np.save(file, people, allow_pickle=False)
    part.replace(path)
