from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from ojfa_export.compiler.report import CalibrationReport, ExitReport, LatencyRow, write_report
from ojfa_export.shortcuts.metrics import ExitQuality
from ojfa_export.verify.check import Check

PICTURES = ("precision_by_exit", "surprisal_by_exit", "precision_matrix")


@pytest.fixture
def make_report(rng):
    """A report with the shape of real ones: a middle level is best, quality grows with depth."""

    def make(blocks=14, **changes):
        levels = np.arange(1, blocks)
        depth = levels / blocks
        matrix = 0.5 * depth[None, :] * np.exp(-8 * (depth[:, None] - depth[None, :]) ** 2)
        matrix += rng.uniform(0, 0.02, matrix.shape)
        chosen = int(matrix.mean(axis=1).argmax()) + 1

        def quality(p):
            return ExitQuality(
                precision_at_1=p,
                precision_at_5=min(1, 1.6 * p),
                precision_at_10=min(1, 1.9 * p),
                surprisal=8 * (1 - p),
            )

        exits = [
            ExitReport(
                blocks=int(i),
                ojfa=quality(matrix[chosen - 1, i - 1]),
                multi_jump=quality(matrix[i - 1, i - 1]),
                identity=quality(0.8 * depth[i - 1] ** 2),
            )
            for i in levels
        ]
        fields = {
            "model": "demo",
            "blocks": blocks,
            "hidden_size": 256,
            "rank": 16,
            "kind": "ojfa",
            "fitted_at": chosen,
            "reason": f"The jump fitted after block {chosen} is best.",
            "parameters": 8704,
            "parameters_multi_jump": 8704 * (blocks - 1),
            "calibration_sources": ["code.txt", "prose.txt"],
            "tokens_fitted": 37000,
            "tokens_held_out": 1000,
            "exits": exits,
            "precision_at_1": matrix.tolist(),
            "surprisal": (8 * (1 - matrix)).tolist(),
        }
        return CalibrationReport(**{**fields, **changes})

    return make


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.cells, self.images = [], [], []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self._in_cell = tag == "td"
        if tag == "img":
            self.images.append(attributes["src"])
            assert attributes["alt"]
        else:
            self.links += [attributes[a] for a in ("src", "href") if a in attributes]

    def handle_data(self, data):
        if self._in_cell:
            self.cells.append(data)
            self._in_cell = False


def test_files_hold_the_report(make_report, tmp_path):
    report = make_report()
    paths = write_report(report, tmp_path)
    assert sorted(paths) == sorted(tmp_path.iterdir())
    assert CalibrationReport.model_validate_json((tmp_path / "report.json").read_text()) == report
    for name in PICTURES:
        picture = Image.open(tmp_path / f"{name}.png")
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(10**6)) > 50


def test_page_stands_alone_and_shows_every_number(make_report, tmp_path):
    report = make_report()
    write_report(report, tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.links == []
    assert not re.search(r"https?:|url\(|@import", re.sub(r"base64,[^\"]*", "", text))
    embedded = [base64.b64decode(src.removeprefix("data:image/png;base64,")) for src in page.images]
    assert embedded == [(tmp_path / f"{name}.png").read_bytes() for name in PICTURES]
    assert len(page.cells) == 13 * 13
    row = report.exits[4]
    shown = page.cells[4 * 13 : 5 * 13]
    expected = ["5"]
    for q in (row.ojfa, row.multi_jump, row.identity):
        expected += [
            f"{100 * p:.1f}" for p in (q.precision_at_1, q.precision_at_5, q.precision_at_10)
        ]
        expected.append(f"{q.surprisal:.2f}")
    assert shown == expected
    assert report.reason in text
    assert "Verification" not in text
    assert "Decode latency" not in text


def test_checks_and_latency_appear_once_they_are_known(make_report, tmp_path):
    report = make_report(
        checks=[
            Check(name="block_00", max_abs_diff=3e-6, tolerance=1e-4, passed=True),
            Check(name="exit 3", max_abs_diff=0.5, tolerance=1e-4, passed=False),
        ],
        latency=[LatencyRow(blocks=14, decode_ms_median=1.2345, decode_ms_p95=2)],
    )
    write_report(report, tmp_path)
    cells = Page((tmp_path / "report.html").read_text()).cells
    assert cells[13 * 13 :] == [
        *("block_00", "3.00e-06", "1e-04", "passed"),
        *("exit 3", "5.00e-01", "1e-04", "FAILED"),
        *("14", "1.234", "2.000"),
    ]


def test_text_from_outside_is_escaped(make_report, tmp_path):
    write_report(make_report(model="<script>alert(1)</script>"), tmp_path)
    assert "<script" not in (tmp_path / "report.html").read_text()


def test_same_report_same_bytes_in_another_process(make_report, tmp_path):
    report = make_report(blocks=6)
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    write_report(report, first)
    code = (
        "import pathlib, sys; from ojfa_export.compiler.report import *; "
        "write_report(CalibrationReport.model_validate_json(pathlib.Path(sys.argv[1]).read_text()),"
        " pathlib.Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, first / "report.json", second], check=True)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    info = Image.open(io.BytesIO((first / "precision_matrix.png").read_bytes())).info
    assert set(info) == {"dpi"}


@pytest.mark.parametrize("blocks", [2, 3, 48])
def test_few_and_many_blocks(make_report, tmp_path, blocks):
    write_report(make_report(blocks=blocks), tmp_path)
    assert len(Page((tmp_path / "report.html").read_text()).cells) == 13 * (blocks - 1)


def test_pictures_leave_matplotlibs_settings_alone(make_report, tmp_path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    write_report(make_report(blocks=3), tmp_path)
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, "Extra inputs"),
        ({"fitted_at": 14}, r"fitted_at 14 is outside 1\.\.13"),
        ({"exits": []}, r"exits are not 1\.\.13"),
        ({"precision_at_1": [[0.5]]}, "precision_at_1 is not 13 x 13"),
        ({"surprisal": [[0.5] * 12] * 13}, "surprisal is not 13 x 13"),
        ({"precision_at_1": [[1.5] * 13] * 13}, "less than or equal to 1"),
    ],
)
def test_reports_that_contradict_themselves_are_refused(make_report, changes, message):
    with pytest.raises(ValidationError, match=message):
        make_report(**changes)


def test_models_load_without_the_build_extra():
    code = (
        "import sys; sys.modules['matplotlib'] = sys.modules['jinja2'] = None; "
        "import ojfa_export.compiler.report, ojfa_export.shortcuts.choose; "
        "assert 'safetensors' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unwritable_folder_is_an_os_error(make_report, tmp_path):
    with pytest.raises(FileNotFoundError):
        write_report(make_report(blocks=3), tmp_path / "absent")
