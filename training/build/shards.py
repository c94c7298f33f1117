"""Samples of several files with one key: webdataset shards, and folders of pictures with their texts beside them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from services.strict_json import canonical_json
from training.build.errors import BuildError
from training.build.pairs import (
    IMAGES,
    LABELS,
    ImageTextPair,
    Source,
    Unusable,
    captions,
    checked_labels,
    meant,
)

# What says something of an image.
TEXTS = (".txt", ".caption", ".json")
BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Member:
    """A file of a sample: its place in the tar, or in the order of the folder; its bytes; or why it cannot be read."""

    offset: int
    size: int
    path: Path | None = None
    problem: str = ""


@dataclass
class Sample:
    """Files of one key, by suffix; or, where they were lost, why."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    problem: str = ""

    def has(self, suffixes: tuple[str, ...]) -> bool:
        """Return whether there is a file with one of the suffixes."""
        return any(suffix in self.members for suffix in suffixes)


class Samples(Source):
    """Samples in order, whatever they lie in: what `Shard` and `Folder` share."""

    def __init__(self, name: str, path: Path, samples: list[Sample]) -> None:
        super().__init__(name)
        self._path, self._samples = path, samples

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, row: int) -> str:
        """See `Source`."""
        return self._samples[row].key

    def digest(self, start: int, stop: int) -> str:
        """See `Source`."""
        samples = self._samples[start:stop]
        listed = [
            [s.key, s.problem, {suffix: [m.offset, m.size, m.problem] for suffix, m in s.members.items()}]
            for s in samples
        ]
        size = self._path.stat().st_size if self._path.is_file() else 0
        digest = hashlib.sha256(canonical_json([size, listed]))
        # Places and sizes stay where a caption is replaced by one as long.
        for sample in samples:
            for suffix in TEXTS:
                if suffix in sample.members and not sample.members[suffix].problem:
                    digest.update(self._content(sample.members[suffix]))
        return digest.hexdigest()

    def _check(self, row: int) -> Member:
        """See `Source`; texts are not read either."""
        return _image_of(self._samples[row])

    def _pairs(self, row: int) -> list[ImageTextPair]:
        sample = self._samples[row]
        image = self._check(row)
        texts = {suffix: self._whole(sample.members[suffix]) for suffix in TEXTS if suffix in sample.members}
        said, fields = _said(texts)
        found, labels = captions(said or fields.get("text")), checked_labels(fields)
        data = self._whole(image)
        return [ImageTextPair(row, sample.key, data, caption, **labels) for caption in found]

    def _whole(self, member: Member) -> bytes:
        data = self._content(member)
        if len(data) != member.size:
            raise Unusable("its data has changed while it was read, or is cut off")
        return data

    @abstractmethod
    def _content(self, member: Member) -> bytes:
        """Return the bytes of a file."""


def _image_of(sample: Sample) -> Member:
    broken = [sample.problem, *(member.problem for member in sample.members.values())]
    if any(broken):
        raise Unusable(next(filter(None, broken)))
    image = next((sample.members[suffix] for suffix in IMAGES if suffix in sample.members), None)
    if image is None:
        others = ", ".join(suffix[1:] for suffix in sample.members)
        raise Unusable(f"no image ({', '.join(suffix[1:] for suffix in IMAGES)}), but {others}")
    return image


def _said(texts: Mapping[str, bytes]) -> tuple[str, dict[str, object]]:
    """Return the text beside an image, and the fields of its JSON by what they are for."""
    try:
        fields = json.loads(texts[".json"]) if ".json" in texts else {}
        said = next((texts[s].decode("utf-8-sig").strip() for s in (".txt", ".caption") if s in texts), "")
    except (ValueError, RecursionError) as error:
        raise Unusable(f"its text or json cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise Unusable("its json is not an object")
    # A text of its own is the caption, whatever the JSON calls one.
    return said, meant(fields, LABELS if said else (*LABELS, "text"))


class Shard(Samples):
    """One webdataset shard: an uncompressed tar whose members `<key>.<extension>` belong together by key.

    An image (png, jpg, jpeg, webp), its caption (txt, caption, or a field of json), and labels as fields of json. Tars
    that were joined by `cat` are read to the end. What is damaged or cut off is a bad row, and reading goes on behind.

    Parameters
    ----------
    path : Path
        The tar.
    name : str
        For people; the file's own where it is empty.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        self._file: BinaryIO | None = None
        super().__init__(name or path.name, path, _index(path))

    def _content(self, member: Member) -> bytes:
        if self._file is None:
            self._file = self._path.open("rb")
        self._file.seek(member.offset)
        return self._file.read(member.size)


class Folder(Samples):
    """Pictures below a folder, each with its text (txt, caption or json) beside it.

    Parameters
    ----------
    path : Path
        The folder; links are not followed, and hidden files are passed over.
    name : str
        For people; the folder's own where it is empty.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        grouper = _Grouper()
        for number, file in enumerate(sorted(path.rglob("*"))):
            inside = file.relative_to(path)
            if any(part.startswith(".") for part in inside.parts) or file.is_symlink() or not file.is_file():
                continue
            if file.suffix.lower() in (*IMAGES, *TEXTS):
                grouper.add(inside.as_posix(), Member(number, file.stat().st_size, file))
        # A text without a picture is something else here: a readme, a licence, a list.
        super().__init__(name or path.name, path, [s for s in grouper.samples() if s.has(IMAGES)])

    def _content(self, member: Member) -> bytes:
        assert member.path is not None
        return member.path.read_bytes()


class _Grouper:
    """Puts files together by key.

    A key ends at the first dot of a file's name, as webdataset has it, unless that leaves a part of the name, such as
    the `5` of `shot 1.5.png`, whose files are a sample only if the key goes on to the last dot. A key that comes again
    with a file that it has already begins a sample of its own.
    """

    def __init__(self) -> None:
        self._all: list[Sample] = []
        self._newest: dict[str, Sample] = {}
        self._dotted: list[tuple[str, Sample]] = []

    def add(self, name: str, member: Member) -> None:
        """Put a file to its sample; names are POSIX paths."""
        path = PurePosixPath(name)
        stem, dot, suffix = path.name.partition(".")
        # Without a dot or before it: no sample's. `._x.png` is what macOS puts beside a file.
        if not dot or not stem or "__MACOSX" in path.parts:
            return
        folder = "" if str(path.parent) == "." else f"{path.parent}/"
        if "." not in suffix:
            self._put(f"{folder}{stem}", f".{suffix.lower()}", member)
            return
        stem, _, suffix = path.name.rpartition(".")
        sample = self._put(f"{folder}{stem}", f".{suffix.lower()}", member)
        first = f"{folder}{path.name.partition('.')[0]}"
        if not self._dotted or self._dotted[-1][1] is not sample:
            self._dotted.append((first, sample))

    def _put(self, key: str, suffix: str, member: Member) -> Sample:
        sample = self._newest.get(key)
        if sample is None or suffix in sample.members:
            sample = self._newest[key] = Sample(key)
            self._all.append(sample)
        sample.members[suffix] = member
        return sample

    def samples(self) -> list[Sample]:
        """Return the samples in order."""
        # `x.mask.png` beside `x.png` is one more file of x, which nobody asked for, unless it has a text of its own.
        extra = {
            id(sample)
            for first, sample in self._dotted
            if first in self._newest and not (sample.has(IMAGES) and sample.has(TEXTS))
        }
        return [sample for sample in self._all if id(sample) not in extra]


def _index(path: Path) -> list[Sample]:
    grouper, lost = _Grouper(), []
    size = path.stat().st_size
    for found in _members(path, size):
        if isinstance(found, Sample):
            lost.append(found)
        elif found.isfile():
            cut = found.offset_data + found.size > size
            problem = f"{found.name} is cut off: the archive ends within it" if cut else ""
            grouper.add(found.name, Member(found.offset_data, 0 if cut else found.size, problem=problem))
        elif not found.isdir():
            grouper.add(
                found.name, Member(found.offset, 0, problem=f"{found.name} is a link inside the archive")
            )
    return [*grouper.samples(), *lost]


def _members(path: Path, size: int) -> Iterator[tarfile.TarInfo | Sample]:
    """Yield the members of a tar, and of all that were joined to it; a sample with a problem for what is damaged.

    `TarFile` itself takes a damaged header, and the end of the first of several tars, for the end of all.
    """
    # Of nothing: it only keeps what a header says of those behind it.
    tar = tarfile.TarFile(fileobj=io.BytesIO(bytes(2 * BLOCK)))
    ended, place = False, 0
    with path.open("rb") as file:
        tar.fileobj = file
        while place < size:
            file.seek(place)
            if not any(file.read(BLOCK)):
                ended, place = True, _behind_zeros(file, place)
                continue
            file.seek(place)
            tar.offset = place
            try:
                member = tarfile.TarInfo.fromtarfile(tar)
            except tarfile.TarError as error:
                behind = _next_header(file, place + BLOCK, size)
                if place == 0 and behind == size:
                    raise BuildError(f"{path} cannot be read as an uncompressed tar: {error}") from error
                yield Sample(
                    f"(byte {place})",
                    problem=f"{behind - place:,} bytes of the archive cannot be read: {error}",
                )
                ended, place = True, behind
                continue
            yield member
            ended, place = False, tar.offset
        if not ended and place <= size:
            yield Sample(f"(byte {size})", problem="the archive has no end: what followed was cut off")


def _behind_zeros(file: BinaryIO, place: int) -> int:
    """Return the place of the next block that is not all zeros, from a block on."""
    step = 2048 * BLOCK
    file.seek(place)
    while data := file.read(step):
        left = data.lstrip(b"\0")
        if left:
            return place + (len(data) - len(left)) // BLOCK * BLOCK
        place += len(data)
    return place


def _next_header(file: BinaryIO, place: int, size: int) -> int:
    """Return the place of the next block that is a header, or `size`."""
    file.seek(place)
    while place < size:
        block = file.read(BLOCK)
        if block[257:262] == b"ustar":
            try:
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                pass
            else:
                return place
        place += BLOCK
    return size
