"""Bytes of text files: compression, encodings, and content that is no text at all."""

import codecs
import gzip
import re
import zlib
from pathlib import Path

# First bytes of other content -> what it is, and the remedy.
_OTHER_CONTENT = {
    b"\x1f\x8b": "gzip; add .gz to the name of the file",
    b"PK\x03\x04": "a zip archive or a workbook of Excel; unpack it, or export it as csv",
    b"\xd0\xcf\x11\xe0": "a workbook of Excel; export it as csv",
    b"BZh": "bzip2; unpack it",
    b"\xfd7zXZ": "xz; unpack it",
    b"\x28\xb5\x2f\xfd": "zstandard; unpack it",
    b"PAR1": "Parquet; give it the extension .parquet",
    b"ARROW1": "an Arrow file; write it as Parquet",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file with `git lfs pull`",
    b"<!doctype html": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
}
# UTF-32's mark for little-endian begins with UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Where NUL bytes lie in text of Latin letters without a byte order mark.
_WITHOUT_MARK = {
    b"[^\0]\0\0\0": "UTF-32LE",
    b"\0\0\0[^\0]": "UTF-32BE",
    b"[^\0]\0": "UTF-16LE",
    b"\0[^\0]": "UTF-16BE",
}


def read_utf8(path: Path, where: str) -> bytes:
    """Read the bytes of a UTF-8 text file, unpacked (.gz), without byte order marks.

    Raises:
        ValueError: the content is not UTF-8 text; the encoding and the command that converts it are
            given, or the byte offset and the line.
    """
    data = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{where}: not a complete gzip file ({error}); it may be truncated: copy or pack "
                "it again."
            ) from error
        if not data:
            raise ValueError(f"{where}: the file is empty when unpacked; write it again.")
    content = other_content(data)
    if content is not None:
        raise ValueError(f"{where}: this is {content}.")
    encoding = _wide_encoding(data)
    if encoding is not None:
        raise ValueError(
            f"{where}: the text is in {encoding}, not UTF-8; convert it: "
            f"`iconv -f {encoding} -t UTF-8 OLD > NEW`."
        )
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = f"byte 0x{data[error.start]:02x} at offset {error.start} (line {line})"
        if error.reason == "unexpected end of data":
            raise ValueError(
                f"{where}: the file ends inside the character that starts with {place}: it is "
                "truncated, copy or write it again."
            ) from error
        # Latin-1 has no printable characters there, Windows has its curly quotes.
        encoding = "windows-1252" if re.search(rb"[\x80-\x9f]", data) else "latin1"
        raise ValueError(
            f"{where}: {place} is not UTF-8; save the file as UTF-8, e.g. "
            f"`iconv -f {encoding} -t UTF-8 OLD > NEW` if it is {encoding}."
        ) from error
    offset = data.find(b"\0")
    if offset >= 0:
        raise ValueError(
            f"{where}: NUL byte at offset {offset}: the file is damaged or no text; write it again."
        )
    # Files that were joined have marks inside.
    return data.removeprefix(codecs.BOM_UTF8).replace(b"\n" + codecs.BOM_UTF8, b"\n")


def other_content(data: bytes) -> str | None:
    """Name what a file holds that begins with these bytes and is no text, and the remedy."""
    start = data[:64].lstrip().lower()
    return next(
        (words for mark, words in _OTHER_CONTENT.items() if start.startswith(mark.lower())), None
    )


def _wide_encoding(data: bytes) -> str | None:
    """The name of UTF-16 or UTF-32, if the data is one of them, as iconv spells it."""
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            return name
    start = data[:64]
    for pattern, name in _WITHOUT_MARK.items():
        if re.fullmatch(b"(?:" + pattern + b")+.{0,3}", start, re.DOTALL):
            return name
    return None
