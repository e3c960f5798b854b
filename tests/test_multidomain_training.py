"""The training of the multi-domain checkpoints: their text, their scripts, and the checkpoints."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from calibration.text import collect
from calibration.training.corpus import Document, merge, split

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tolerances  # noqa: E402

from calibration.multidomain import sources  # noqa: E402
from calibration.multidomain.prepare import read_corpus, write_corpus  # noqa: E402
from calibration.training.tokens import train_tokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
MULTIDOMAIN = ROOT / "calibration" / "multidomain"
CHECKPOINTS = Path(os.environ.get("OJFA_CHECKPOINTS", ROOT / ".checkpoints"))
FAMILIES = ("gpt2", "phi3")
DOMAINS = ("code", "docs", "headers")
DOCUMENTS = st.lists(st.builds(Document, st.text(min_size=1), st.text()), max_size=30)


@given(DOCUMENTS, st.floats(0, 1))
def test_split_is_disjoint_and_independent_of_order(documents, share):
    unique = list({document.path: document for document in documents}.values())
    corpus = split(unique, share)
    texts = [document.text for document in (*corpus.train, *corpus.held_out)]
    assert len(texts) == len(set(texts))
    assert set(texts) == {document.text for document in unique}
    assert split(unique[::-1], share).digest == corpus.digest


def test_a_document_changes_its_part_with_no_other_document():
    documents = [Document(f"file{i}", f"text {i}") for i in range(2_000)]
    held_out = set(split(documents, 0.06).held_out)
    assert set(split(documents[::3], 0.06).held_out) == held_out & set(documents[::3])
    assert 60 < len(held_out) < 200


def test_more_held_out_text_only_adds_to_it():
    documents = [Document(f"file{i}", f"text {i}") for i in range(500)]
    assert set(split(documents, 0.1).held_out) < set(split(documents, 0.3).held_out)


@given(DOCUMENTS)
def test_corpus_file_restores_the_corpus(tmp_path_factory, documents):
    domains = {"one": split(documents, 0.5), "two": split(documents[::2], 0.5)}
    path = tmp_path_factory.mktemp("corpus") / "corpus.json.xz"
    write_corpus(path, domains)
    assert read_corpus(path) == domains


def write_package(root: Path, name: str, docstring: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # Short lines below: a file of long ones counts as a table.
    path.write_text(f"def f():\n    {docstring!r}\n" + "x = y\n" * 40, encoding="utf-8")


def test_docs_hold_prose_once_and_no_code(tmp_path):
    prose = " ".join(["Adds two numbers and explains at length how that is done."] * 5)
    other = " ".join(["Subtracts them, which takes other words than those above."] * 5)
    write_package(tmp_path, "numpy/a.py", f"{prose}\n\n>>> 1 + 1\n2\n\nSee also g.")
    write_package(tmp_path, "numpy/b.py", f"{prose}\n\n{other}")
    write_package(tmp_path, "numpy/c.py", prose)
    write_package(tmp_path, "numpy/d.py", f"{prose.lower()} Read /home/someone/notes.")
    write_package(tmp_path, "unlisted/a.py", prose)
    assert list(sources.read_docs(tmp_path)) == [
        Document("numpy/a.py", f"{prose}\n\nSee also g.\n"),
        Document("numpy/b.py", f"{other}\n"),
    ]


def test_headers_must_state_the_licence(tmp_path):
    directory = tmp_path / "openssl"
    directory.mkdir()
    notice = "/*\n * Licensed under the Apache License 2.0\n */\n"
    (directory / "free.h").write_text(notice + "int f(void);\n")
    (directory / "late.h").write_text("int f(void);\n" * 50 + notice)
    (directory / "other.h").write_text("int g(void);\n")
    assert [document.path for document in sources.read_headers(tmp_path)] == ["openssl/free.h"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_text_is_clean(domain):
    data = (MULTIDOMAIN / "heldout" / f"{domain}.txt").read_bytes()
    text = data.decode("utf-8")
    assert 300_000 <= len(data) <= 400_000
    assert "\r" not in text
    assert "\0" not in text
    assert not collect.UNWANTED.search(text)


def test_held_out_code_was_not_trained_on_by_the_demo_either():
    """The same share and hash: the demo's calibration text stays unseen here."""
    training = json.loads((ROOT / "calibration/demo/checkpoint/training.json").read_text())
    paths = training["text"]["held_out_files"]
    documents = [Document(path, path) for path in paths]
    assert len(split(documents, 0.06).held_out) == len(paths)


@pytest.fixture(scope="module")
def tiny_text(tmp_path_factory) -> Path:
    """A text directory of a few thousand tokens in two domains, cut from this project's source."""
    directory = tmp_path_factory.mktemp("text")
    files = sorted((ROOT / "ojfa_export").rglob("*.py"))[:30]
    code = [Document(path.name, path.read_text(encoding="utf-8")[:800]) for path in files]
    docs = [
        Document(document.path, ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) * 3)
        for document, path in zip(code, files, strict=True)
        if ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    domains = {"code": split(code, 0.3), "docs": split(docs, 0.3)}
    write_corpus(directory / "corpus.json.xz", domains)
    train_tokenizer(merge(domains.values()).train).save(str(directory / "tokenizer.json"))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_training_run_gives_a_loadable_checkpoint(family, tiny_text, tmp_path):
    output = tmp_path / "checkpoint"
    options = ["--steps=3", "--batch=2", "--context=64", "--device=cpu"]
    command = [sys.executable, MULTIDOMAIN / "train.py", family, "--text", tiny_text]
    # One thread: several that spin for the same busy cores take minutes for these seconds.
    subprocess.run(
        [*command, "-o", output, *options], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    training = json.loads((output / "training.json").read_text())
    trained = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert trained.config.model_type == family
    assert training["steps"] == 3
    assert training["tokens_seen"] == 3 * 2 * 64
    # Three steps at the start of the warm-up leave the model next to a uniform guess.
    uniform = math.log(trained.config.vocab_size)
    parts = training["domains"]
    assert set(parts) == {"code", "docs"}
    for facts in (training, *parts.values()):
        assert abs(facts["held_out_loss_nats_per_token"] - uniform) < 0.5
    assert training["text"]["held_out_tokens"] == sum(p["held_out_tokens"] for p in parts.values())
    assert trained.config.num_hidden_layers == 12


def test_training_refuses_text_that_is_not_there(tmp_path):
    command = [sys.executable, MULTIDOMAIN / "train.py", "gpt2", "--text", tmp_path]
    result = subprocess.run(
        [*command, "-o", tmp_path / "checkpoint"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "prepare.py" in result.stderr


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request) -> Path:
    """A checkpoint trained on the GPU; set OJFA_CHECKPOINTS to the directory of both."""
    path = CHECKPOINTS / f"multidomain-{request.param}"
    if not (path / "model.safetensors").is_file():
        pytest.skip(f"no checkpoint {path.name}: calibration/multidomain/README.md says how to")
    return path


def test_checkpoint_has_the_promised_size(checkpoint):
    training = json.loads((checkpoint / "training.json").read_text())
    assert 8_000_000 <= training["parameters"] < 8_500_000
    assert (checkpoint / "model.safetensors").stat().st_size <= 16_700_000


@pytest.mark.slow
@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_loss_is_the_reported_one(checkpoint, domain):
    reported = json.loads((checkpoint / "training.json").read_text())["domains"][domain]
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = (MULTIDOMAIN / "heldout" / f"{domain}.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text).ids)
    windows = ids[: ids.numel() // 512 * 512].view(-1, 512)[::8]
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    losses = []
    with torch.inference_mode():
        for batch in windows.split(8):
            logits = model(batch, use_cache=False).logits[:, :-1].transpose(1, 2)
            losses.append(torch.nn.functional.cross_entropy(logits, batch[:, 1:]) * len(batch))
    loss = float(sum(losses)) / len(windows)
    difference = abs(loss - reported["held_out_loss_nats_per_token"])
    assert difference < tolerances.MULTIDOMAIN_LOSS_NATS
