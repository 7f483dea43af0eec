"""The head of a GGUF file: its settings and the names of its tensors, in a tenth of a second.

The gguf package reads all of it into arrays, which takes seconds. The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
FLOAT32 = 0  # of tensors
FACTORS = "rope_freqs.weight"
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")  # llama.cpp's names of the parts of one model


@dataclass(frozen=True)
class GgufHeader:
    settings: dict[str, int | float | bool | str]  # arrays are left out
    tensors: tuple[str, ...]
    rope_factors: tuple[
        float, ...
    ] = ()  # what each rotary frequency is divided by (Llama 3.1); transformers reads none

    def number(self, key: str) -> int | None:
        value = self.settings.get(key)
        return int(value) if isinstance(value, int | float) else None


def is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def read_header(path: Path) -> GgufHeader:
    """ValueError where the file is no GGUF file, or ends within its head."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except (ValueError, struct.error, IndexError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as a GGUF file: "
            + ("it ends within its head" if path.stat().st_size and is_gguf(path) else "it does not begin as one does")
            + f" ({path.stat().st_size:,} bytes). Likely its download was cut short; fetch it again."
        ) from error


def check_whole(path: Path, header: GgufHeader) -> None:
    """ValueError for one part of several, or for tensors that transformers would leave out without a word."""
    match = SPLIT_NAME.fullmatch(path.name)
    parts = max(header.number("split.count") or 1, int(match.group(3)) if match else 1)
    if parts > 1:
        part = (header.number("split.no") or 0) + 1 if match is None else int(match.group(2))
        stem = match.group(1) if match else path.stem
        names = [f"{stem}-{i:05}-of-{parts:05}.gguf" for i in range(1, parts + 1)]
        absent = [name for name in names if match is not None and not (path.parent / name).exists()]
        there = f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not beside it. " if absent else ""
        raise ValueError(
            f"{path} is part {part} of {parts} of a split GGUF model, and only a whole file can be read. {there}"
            f"Join the parts with llama.cpp: llama-gguf-split --merge {names[0]} {stem}.gguf"
        )
    architecture = header.settings.get("general.architecture")
    blocks = header.number(f"{architecture}.block_count")
    above = [
        name for name in header.tensors if (at := re.match(r"blk\.(\d+)\.", name)) and int(at[1]) >= (blocks or 1 << 30)
    ]
    if above:
        raise ValueError(
            f"{path} says that it has {blocks} layers ({architecture}.block_count), and holds tensors of more: {above[0]}. "
            "Such a model (with extra prediction layers, say) cannot be read whole; take its safetensors."
        )
    scaling = header.settings.get(f"{architecture}.rope.scaling.type", "none")
    long = [name for name in header.tensors if name.startswith("rope_factors_")]
    if architecture != "gpt-oss" and (long or scaling != "none"):
        what = long[0] if long else f"{architecture}.rope.scaling.type={scaling}"
        raise ValueError(
            f"{path} scales its rotary positions ({what}), and transformers does not read that from a GGUF file: its answers "
            "would be another model's. Take the model's safetensors."
        )


class _Reader:
    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def header(self) -> GgufHeader:
        if self.data[:4] != MAGIC:
            raise ValueError("no magic bytes")
        self.at = 4
        version = self.take("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format")
        tensors, count = self.take("Q"), self.take("Q")
        settings: dict[str, int | float | bool | str] = {}
        for _ in range(count):
            key, value = self.text(), self.value(self.take("I"))
            if value is not None:
                settings[key] = value
        places = dict(self.tensor() for _ in range(tensors))
        alignment = int(settings.get("general.alignment", 32))
        return GgufHeader(
            settings, tuple(places), self.floats(-(-self.at // alignment) * alignment, places.get(FACTORS))
        )

    def take(self, code: str) -> int:
        value = struct.unpack_from(f"<{code}", self.data, self.at)[0]
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        size = self.take("Q")
        if self.at + size > len(self.data):
            raise IndexError(size)
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int) -> int | float | bool | str | None:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.take(SCALARS[kind])
        inner, count = self.take("I"), self.take("Q")
        if inner in SCALARS:
            self.at += count * struct.calcsize(f"<{SCALARS[inner]}")
            if self.at > len(self.data):
                raise IndexError(count)
        else:
            for _ in range(count):
                self.value(inner)
        return None

    def tensor(self) -> tuple[str, tuple[int, int, int]]:
        """A tensor's name; how many numbers it has, of which type, and where they begin after the head."""
        name, size = self.text(), 1
        for _ in range(self.take("I")):
            size *= self.take("Q")
        return name, (size, self.take("I"), self.take("Q"))

    def floats(self, start: int, place: tuple[int, int, int] | None) -> tuple[float, ...]:
        if place is None:
            return ()
        size, kind, offset = place
        if kind != FLOAT32:
            raise ValueError(f"{FACTORS} of type {kind}")
        return struct.unpack_from(f"<{size}f", self.data, start + offset)
