"""From what a record calls its images to files that are there, without opening any of them."""

import base64
import binascii
import hashlib
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from evocomp.data.turns import Fault

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_LEAST_BASE64 = 64
"""Characters from which a name that is no file may be base64: the smallest PNG takes more."""

_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")


def named_images(record: dict[str, Any]) -> list[Any]:
    """What a record calls its images, by `image` or `images`: names, not yet checked; empty for none.

    Raises:
        Fault: it has a video or sound, a list within a list, or two keys that differ.
    """
    for key in _OTHER_MEDIA:
        if record.get(key):
            raise Fault(f"has `{key}`, which is not supported; only images are")
    given = [_as_list(record.get(key)) for key in ("image", "images")]
    if given[0] and given[1] and given[0] != given[1]:
        raise Fault("has both `image` and `images`, and they differ")
    return given[0] or given[1]


class ImageFolder:
    """Finds images by name. Each folder is listed once, so that hundreds of thousands of names take no time.

    Args:
        folder: what names are relative to.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._listed: dict[str, dict[str, bool]] = {}

    def find(self, source: Any) -> tuple[str, str]:
        """Path (or `data:` URI) of an image and its name.

        Raises:
            Fault: it is not there, or no file.
        """
        if isinstance(source, dict):
            source = source.get("path") or source.get("url") or source.get("bytes")
        if not isinstance(source, str):
            raise Fault(f"names its image by {type(source).__name__}, not by text")
        if source.startswith("data:"):
            return _data_uri(source, source.partition(",")[2])
        path = self.folder / _local(source)
        if self._is_file(path):
            return str(path), source
        other = self.folder / source.replace("\\", "/")  # written on Windows
        if "\\" in source and self._is_file(other):
            return str(other), source
        if len(source) >= _LEAST_BASE64 and _signature(source):
            return _data_uri(f"data:image;base64,{source}", source)
        shown = str(path) if len(str(path)) <= 200 else f"{str(path)[:197]}..."
        raise Fault(f"image {shown} {'is a folder' if os.path.isdir(path) else 'is missing'}")

    def _is_file(self, path: Path) -> bool:
        parent, name = os.path.split(path)
        if parent not in self._listed:
            self._listed[parent] = _files_in(parent)
        # what is not listed may still be there: under another spelling of its letters, or behind ".."
        return self._listed[parent].get(name) or os.path.isfile(path)


def _as_list(given: Any) -> list[Any]:
    if given is None or given == "" or given == [] or given != given:  # NaN, as pandas writes it for nothing
        return []
    items = given if isinstance(given, list) else [given]
    if any(isinstance(item, list) for item in items):
        raise Fault("has a list of images within a list; give names only")
    if any(item is None or item == "" for item in items):
        raise Fault("has an image without a name in its list")
    return items


def _local(source: str) -> str:
    """The path that a name stands for; a `file:` URI is one too."""
    scheme = _SCHEME.match(source)
    if scheme is None or "\n" in source[:200]:
        return source
    if scheme[0].lower() == "file:":
        return unquote(urlsplit(source).path)
    if source[scheme.end() : scheme.end() + 2] == "//":
        shown = source if len(source) <= 120 else f"{source[:117]}..."
        raise Fault(f"image {shown} is a URL; download it and give the file's name")
    return source


def _files_in(folder: str) -> dict[str, bool]:
    """Names of the files in a folder; links are left for a second look."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: True for entry in entries if entry.is_file(follow_symlinks=False)}
    except (OSError, ValueError):
        return {}


def _signature(text: str) -> bool:
    """Whether base64 text begins as an image file does."""
    try:
        head = base64.b64decode(text[:_LEAST_BASE64], validate=True)
    except (binascii.Error, ValueError):
        return False
    return head.startswith(_SIGNATURES)


def _data_uri(uri: str, content: str) -> tuple[str, str]:
    if ";base64" not in uri.partition(",")[0].lower():
        raise Fault("has an image as a data: URI that is not base64")
    compact = "".join(content.split())
    name = f"base64-{hashlib.sha256(compact.encode('utf-8', 'replace')).hexdigest()[:16]}"
    return f"{uri.partition(',')[0]},{compact}", name
