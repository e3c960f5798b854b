"""Reading logs: a prompt per line, or JSONL with the fields prompt or text, and domain."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ojfa_export.errors import LogError
from ojfa_export.system.pipes import read_named

JSONL = (".jsonl", ".ndjson")
FORM = 'each line should look like {"prompt": "...", "domain": "..."}, or have "text" for "prompt"'


@dataclass(frozen=True)
class Request:
    """One request of a log.

    Attributes:
        place: File and line, for messages.
        content: The text.
        generate: Whether the text is a prompt that the model shall go on from; else it is read as
            it is, word for word, as calibration does.
        domain: What kind of text it is; None where the log doesn't say.
    """

    place: str
    content: str
    generate: bool
    domain: str | None


def read_logs(sources: Sequence[Path], domains: Sequence[str]) -> list[Request]:
    """Reads LOG or DOMAIN=LOG, in their order, which is taken as the order in time.

    Args:
        sources: Text files with a prompt per line, or JSONL files (*.jsonl, *.ndjson).
        domains: Those of the bundle's promise.

    Raises:
        LogError: A file that is missing, binary, empty, or not what its name says; a domain of
            which nothing was promised.
    """
    requests = [request for source in sources for request in _read(source)]
    for request in requests:
        if request.domain is not None and request.domain not in domains:
            raise LogError(
                f"{request.place}: nothing was promised of domain '{request.domain}'",
                hint=f"the bundle's domains: {', '.join(domains)}; leave it out if it is another",
            )
    return requests


def _read(source: Path) -> list[Request]:
    named = None if source.exists() else re.fullmatch(r"([\w][\w.+-]*)=(.+)", str(source))
    path, domain = (source, None) if named is None else (Path(named[2]), named[1])
    lines = enumerate(_read_text(path).split("\n"), start=1)
    full = [(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    if not full:
        raise LogError(f"log {path} is empty", hint="give a log with a prompt in each line")
    if path.suffix in JSONL:
        return [_parse(place, line, domain) for place, line in full]
    return [Request(place, line.removesuffix("\r"), True, domain) for place, line in full]


def _read_text(path: Path) -> str:
    try:
        text = read_named(path).decode("utf-8-sig")
    except OSError as error:
        raise LogError(
            f"log {path} can't be read: {error.strerror or error}",
            hint="name a file with a prompt in each line, or JSONL",
        ) from error
    except UnicodeDecodeError as error:
        raise LogError(
            f"log {path} is not text: byte {error.start} is not UTF-8",
            hint="name a text file in UTF-8",
        ) from error
    if "\0" in text:
        raise LogError(f"log {path} is binary", hint="name a text file in UTF-8")
    return text


def _parse(place: str, line: str, domain: str | None) -> Request:
    try:
        fields: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LogError(f"{place}: not JSON: {error}", hint=FORM) from error
    if not isinstance(fields, dict):
        raise LogError(f"{place}: not a JSON object", hint=FORM)
    for name, value in fields.items():
        if name not in ("prompt", "text", "domain"):
            raise LogError(f"{place}: unknown field '{name}'", hint=FORM)
        if not isinstance(value, str) and (name != "domain" or value is not None):
            raise LogError(f"{place}: '{name}' is no string", hint=FORM)
    contents = [name for name in ("prompt", "text") if name in fields]
    if len(contents) != 1:
        what = "both 'prompt' and 'text'" if contents else "neither 'prompt' nor 'text'"
        raise LogError(f"{place}: it has {what}", hint=FORM)
    content = fields[contents[0]]
    if not content:
        raise LogError(f"{place}: '{contents[0]}' is empty", hint=FORM)
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise LogError(
            f"{place}: '{contents[0]}' holds half a surrogate pair",
            hint="write the file as UTF-8, or with whole \\uXXXX pairs",
        )
    found = fields.get("domain")
    if domain is not None and found not in (None, domain):
        raise LogError(
            f"{place}: domain '{found}' in a log that was given as '{domain}'",
            hint="give the log without DOMAIN=",
        )
    return Request(place, content, contents[0] == "prompt", found or domain)
