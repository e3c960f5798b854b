"""Model repositories for Triton: what is written, and when it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import ojfa_export
from ojfa_export.cli.app import app
from ojfa_export.errors import OjfaError, UsageError
from ojfa_export.serving import triton_repository
from ojfa_export.serving.triton_repository import TritonSettings, write_repository


@pytest.mark.parametrize("link", [False, True])
def test_a_repository_holds_the_bundle(served_bundle: Path, tmp_path, link):
    arguments = ["-o", str(tmp_path / "models"), *(["--link"] if link else [])]
    done = CliRunner().invoke(app, ["triton", str(served_bundle), *arguments, "--json"])
    assert done.exit_code == 0
    model = tmp_path / "models" / "small"
    assert json.loads(done.stdout) == {"model": str(model), "name": "small"}
    bundle = model / "1" / "bundle.ojfa"
    assert bundle.is_symlink() == link
    assert ojfa_export.load(bundle).manifest == ojfa_export.load(served_bundle).manifest
    compile((model / "1" / "model.py").read_text(), "model.py", "exec")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


def test_a_name_that_is_taken(served_bundle: Path, tmp_path):
    settings = TritonSettings(max_sequences=3)
    write_repository(served_bundle, tmp_path, settings, name="one", link=True)
    with pytest.raises(UsageError, match="exists already"):
        write_repository(served_bundle, tmp_path, settings, name="one")
    other = TritonSettings(max_sequences=4, exit=2, kv_cache=1 << 20)
    model = write_repository(served_bundle, tmp_path, other, name="one", link=True, overwrite=True)
    text = (model / "config.pbtxt").read_text()
    for name, value in (("max_sequences", 4), ("exit", 2), ("kv_cache", 1 << 20)):
        assert f'key: "{name}", value: {{ string_value: "{value}" }}' in text
    (tmp_path / "two").mkdir()
    with pytest.raises(UsageError, match=r"holds no config\.pbtxt"):
        write_repository(served_bundle, tmp_path, settings, name="two", overwrite=True)


def test_what_fails_leaves_nothing(served_bundle: Path, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(triton_repository, "publish", fail)
    with pytest.raises(OSError, match="no space"):
        write_repository(served_bundle, tmp_path / "models", TritonSettings())
    assert not list(tmp_path.glob("**/config.pbtxt"))
    monkeypatch.undo()
    wrong = [
        (served_bundle, TritonSettings(), "a/b"),
        (served_bundle, TritonSettings(exit=99), "a"),
        (served_bundle, TritonSettings(backend="other"), "a"),
        (tmp_path / "nowhere.ojfa", TritonSettings(), None),
    ]
    for bundle, settings, name in wrong:
        with pytest.raises(OjfaError):
            write_repository(bundle, tmp_path / "others", settings, name=name)
    assert not (tmp_path / "others").exists()
