"""What the public interfaces of the two runtimes have, read from themselves."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vectors.cases import open_bundle

import ojfa_export
from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.runtime.monitor import Monitor
from ojfa_export.runtime.stats import Stats
from ojfa_export.runtime.step_output import Choice, Step

INCLUDE = Path(__file__).parents[2] / "engines" / "include" / "ojfa"
CPP_CLASSES = (
    ("ojfa.hpp", ("Model", "Session", "Generation")),
    (
        "types.hpp",
        (
            *("LoadOptions", "SessionOptions", "GenerateOptions", "Policy"),
            *("Step", "Stats", "Answer", "Decision"),
        ),
    ),
    ("ojfa.h", ("ojfa_model_info", "ojfa_speculation", "ojfa_stats")),
)
# The structs of C that are classes of C++, too.
OF_C = {"ojfa_speculation": "Speculation", "ojfa_stats": "Stats"}


def python_names() -> list[str]:
    """`load(backend)`, `Session.advance`, `Session.advance(exit)`, `Stats.exits` and so on."""
    names = list(_of_callable("load", ojfa_export.load))
    model = open_bundle("llama")
    monitor = Monitor(0.5)
    for each in (model, model.session(monitor=monitor), monitor, Stats()):
        names += _of_object(type(each).__name__, each)
    names += _of_callable("Engine", ojfa_export.Engine)
    for kind in (Step, Choice, Speculation, ExitPolicy, ojfa_export.Token):
        fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        own = [field.name for field in fields] or list(kind.model_fields)
        names += [f"{kind.__name__}.{name}" for name in own]
    return names


def _of_object(owner: str, instance: Any) -> Iterator[str]:
    # In the order of the source: the class's own members first, then what its objects hold.
    members = [name for kind in type(instance).__mro__[:-1] for name in vars(kind)]
    for name in dict.fromkeys([*members, *vars(instance)]):
        if name.startswith("_"):
            continue
        value = inspect.getattr_static(type(instance), name, None)
        if inspect.isfunction(value):
            yield from _of_callable(f"{owner}.{name}", value)
        else:
            yield f"{owner}.{name}"


def _of_callable(name: str, function: Callable[..., Any]) -> Iterator[str]:
    yield name
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:  # the options, one by one
            yield from (f"{name}({field.name})" for field in dataclasses.fields(GenerationOptions))
        elif parameter.name != "self":
            yield f"{name}({parameter.name})"


def cpp_names() -> list[str]:
    """`Session::advance`, `Session::advance(exit)`, `Stats::exits`, and functions only C has."""
    names: list[str] = []
    texts = {file: _without_comments((INCLUDE / file).read_text()) for file, _ in CPP_CLASSES}
    for file, kinds in CPP_CLASSES:
        for kind in kinds:
            names += _of_class(texts[file], kind)
    wrapped = texts["ojfa.hpp"] + texts["types.hpp"]
    functions = re.findall(r"OJFA_API [\w ]+?\*? ?(ojfa_\w+)\(", texts["ojfa.h"])
    names += [name for name in functions if not re.search(rf"\b{name}\b", wrapped)]
    return list(dict.fromkeys(names))


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def _of_class(text: str, kind: str) -> Iterator[str]:
    found = re.search(rf"\b(class|struct) {kind}\b[^;{{]*{{", text)
    assert found, f"no {kind}"
    public, owner = found[1] == "struct", OF_C.get(kind, kind)
    for statement in _statements(text[found.end() :]):
        label = re.match(r"\s*(public|private):", statement)
        if label:
            public, statement = label[1] == "public", statement[label.end() :]
        statement = " ".join(statement.split())
        if not public or not statement or re.match(r"(friend|using)\b", statement):
            continue
        method = re.match(r"[^(=]*?\b(\w+) ?\((.*)\)", _without_arguments(statement))
        if method is None:
            yield from (f"{owner}::{name}" for name in _declared(_without_arguments(statement)))
        elif method[1] != kind and "operator" not in statement:
            yield f"{owner}::{method[1]}"
            yield from (
                f"{owner}::{method[1]}({_declared(parameter)[0]})"
                for parameter in _split(method[2])
            )


def _without_arguments(statement: str) -> str:
    """A declaration without those of templates."""
    while (shorter := re.sub(r"<[^<>]*>", "", statement)) != statement:
        statement = shorter
    return statement


def _statements(text: str) -> Iterator[str]:
    """A class's declarations, without what is in braces, to its end."""
    depth, statement = 0, ""
    for character in text:
        if character == "}":
            depth -= 1
            if depth < 0:
                return
            if depth == 0 and statement.rstrip().endswith((")", "const")):  # of a function
                yield statement
                statement = ""
        elif character == "{":
            depth += 1
        elif depth == 0 and character == ";":
            yield statement
            statement = ""
        elif depth == 0:
            statement += character


def _split(text: str) -> list[str]:
    """Parts between the commas that are in no brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def _declared(text: str) -> list[str]:
    """The names of a declaration of variables."""
    return [re.findall(r"\w+", part.split("=")[0])[-1] for part in _split(text)]
