"""The page's files: how they are served, and what they must not hold."""

from __future__ import annotations

import asyncio
import re
from importlib import resources
from pathlib import Path

import pytest

from ojfa_export.serving.page_files import FILES, POLICY

PAGE = Path(str(resources.files("ojfa_export.serving").joinpath("page")))
NAMES = sorted(name for name, _ in FILES.values())
# Of WCAG 2.2, level AA: text, and the lines and marks that say something.
TEXT_CONTRAST, MARK_CONTRAST = 4.5, 3.0


def read(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def test_every_file_is_served_and_nothing_else_is_there():
    assert sorted(path.name for path in PAGE.iterdir()) == NAMES


@pytest.mark.parametrize("keys", [(), ("secret",)])
def test_the_page_needs_no_key(client, keys):
    async def main():
        async with client(api_keys=keys) as http:
            for path, (name, kind) in FILES.items():
                answer = await http.get(path)
                assert answer.status_code == 200
                assert answer.headers["content-type"] == kind
                assert answer.headers["content-security-policy"] == POLICY
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert answer.headers["referrer-policy"] == "no-referrer"
                assert answer.text == read(name)
                assert (await http.head(path)).status_code == 200
                assert (await http.post(path)).status_code == 405
            assert (await http.get("/page/index.html")).status_code == (401 if keys else 404)
            assert (await http.get("/v1/models")).status_code == (401 if keys else 200)

    asyncio.run(main())


def test_the_policy_lets_nothing_from_elsewhere_in():
    directives = dict(each.split(" ", 1) for each in POLICY.split("; "))
    assert directives.pop("default-src") == "'none'"
    assert set(directives.values()) == {"'self'", "'none'"}
    for name in ("base-uri", "form-action", "frame-ancestors"):
        assert directives[name] == "'none'"
    assert "unsafe" not in POLICY


@pytest.mark.parametrize("name", NAMES)
def test_files_load_nothing_from_elsewhere(name):
    text = read(name)
    assert "//" not in re.sub(r"(?m)^\s*//.*$|;\s+//.*$", "", text), "an address of elsewhere"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert not re.search(r"localStorage|sessionStorage|document\.cookie", text), "a key is kept"
    assert len(text.splitlines()) < 400


def test_the_document_needs_no_exception_from_the_policy():
    text = read("index.html")
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)", text)
    assert set(re.findall(r'\s(?:src|href)="([^"]*)"', text)) == {"page.css", "page.js"}
    labelled = set(re.findall(r'<label for="([^"]*)"', text))
    for control in re.findall(r"<(?:input|select|textarea)[^>]*>", text):
        name = re.search(r'id="([^"]*)"', control)
        inside = re.search(rf"<label[^>]*>(?:(?!</label>)[^\0])*{re.escape(control)}", text)
        assert inside or (name and name[1] in labelled), control


def test_what_scripts_ask_for_by_id_is_there():
    ids = set(re.findall(r'\sid="([^"]*)"', read("index.html")))
    assert set(re.findall(r'\bat\("([^"]*)"\)', read("page.js"))) <= ids


def colours(block: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrasts(scheme):
    light, dark = read("page.css").split("@media (prefers-color-scheme: dark)", 1)
    found = colours(light) | (colours(dark) if scheme == "dark" else {})
    for number in range(1, 7):
        assert contrast(found["step-text"], found[f"step-{number}"]) >= TEXT_CONTRAST, number
        assert contrast(found["wrong"], found[f"step-{number}"]) >= MARK_CONTRAST, number
    for back in ("back", "panel"):
        for text in ("text", "soft", "accent", "wrong"):
            assert contrast(found[text], found[back]) >= TEXT_CONTRAST, (text, back)
        assert contrast(found["line"], found[back]) >= MARK_CONTRAST, back
    assert contrast(found["on-accent"], found["accent"]) >= TEXT_CONTRAST


def test_the_list_of_models_says_what_the_page_needs(client):
    async def main():
        async with client(exit="auto") as http:
            listed = (await http.get("/v1/models")).json()["data"][0]
            one = (await http.get("/v1/models/small")).json()
            schemas = (await http.get("/openapi.json")).json()["components"]["schemas"]
            return listed, one, schemas

    listed, one, schemas = asyncio.run(main())
    assert listed == one
    assert listed["ojfa"]["exit"] == "auto"
    assert set(listed["ojfa"]) == set(schemas["Model"]["properties"]["ojfa"]["properties"])
    assert set(listed["ojfa"]["promise"]) == set(schemas["Promise"]["properties"])
