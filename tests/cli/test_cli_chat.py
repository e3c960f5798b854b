"""`run --chat` and `chat`: answers of a chat model, by the bundle's template."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from bundle.bundle_copy import BundleCopy
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import ojfa_export
from ojfa_export.cli.app import app
from ojfa_export.errors import BundleError

PAGE = Path(__file__).parents[2] / "docs" / "chat.md"
TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


@pytest.fixture(scope="module")
def chat_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the other tests, with a chat template."""
    copy = tmp_path_factory.mktemp("chat") / "checkpoint"
    shutil.copytree(checkpoint, copy)
    (copy / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def chat_bundle(chat_checkpoint: Path, calibration_text: Path) -> Path:
    output = chat_checkpoint.parent / "chat.ojfa"
    args = ["build", str(chat_checkpoint), "-o", str(output), "--skip-verification", "-q"]
    args += ["--shortcut", "ojfa", "--calibration-data", str(calibration_text)]
    assert CliRunner().invoke(app, args).exit_code == 0
    return output


def expected(checkpoint: Path, messages: list[dict[str, str]], count: int) -> str:
    """The answer of transformers."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**ids, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_question_is_answered_in_the_template(chat_bundle, chat_checkpoint, invoke) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "def f("}]
    answer = expected(chat_checkpoint, messages, 12)
    args = ["run", chat_bundle, "--chat", "def f(", "--system", "S", "--exit", "full"]
    result = invoke(*args, "--max-new-tokens", 12)
    assert result.exit_code == 0, result.output
    assert result.stdout == answer + "\n"
    document = json.loads(invoke(*args, "--max-new-tokens", 12, "--json").stdout)
    assert document["prompts"][0]["text"] == answer
    model = ojfa_export.load(chat_bundle)
    assert model.chat(messages, exit="full", max_new_tokens=12).text == answer
    assert model.render(messages) == "system: S\nuser: def f(\nassistant: "


def test_the_page_runs_as_it_is_written(chat_bundle, tmp_path, monkeypatch) -> None:
    (tmp_path / "model.ojfa").symlink_to(chat_bundle)
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(f"import ojfa_export\n{block}", str(PAGE), "exec"), {})


def test_a_chat_goes_on_after_what_was_said(chat_bundle, chat_checkpoint, invoke) -> None:
    messages: list[dict[str, str]] = []
    for question in ("one", "two"):
        messages.append({"role": "user", "content": question})
        answer = expected(chat_checkpoint, messages, 6)
        messages.append({"role": "assistant", "content": answer})
    args = ["chat", chat_bundle, "--exit", "full", "--max-new-tokens", 6]
    result = invoke(*args, stdin="one\n\ntwo\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(f"{each['content']}\n" for each in messages[1::2])
    assert json.loads(invoke(*args, "--json", stdin="one\ntwo").stdout) == {"messages": messages}


def test_a_prompt_may_be_left_out_of_what_is_printed(bundle, invoke) -> None:
    args = ["run", bundle, "-p", "def f(", "--exit", "full", "--max-new-tokens", 5]
    with_prompt, alone = invoke(*args).stdout, invoke(*args, "--no-echo").stdout
    assert with_prompt == f"def f({alone}"


def test_a_chat_model_that_ends_at_once_gets_a_hint(bundle, chat_bundle, invoke) -> None:
    hint = "note: the model ended at once; it is a chat model, and --chat TEXT puts a question into"
    [end, *_] = ojfa_export.load(chat_bundle).spec.eos_token_ids
    ending = ["--exit", "full", "--max-new-tokens", 8, "--logit-bias", f"{end}=1000"]
    for more in ([], ["--json"], ["-p", "also"]):
        result = invoke("run", chat_bundle, "-p", "def f(", *ending, *more)
        assert result.exit_code == 0, result.output
        assert hint in result.stderr
        assert hint not in result.stdout
    going_on = ["--exit", "full", "--max-new-tokens", 8, "--logit-bias", f"{end}=-1000"]
    for quiet in (
        ["run", bundle, "-p", "def f(", *ending],  # no chat model
        ["run", chat_bundle, "--chat", "def f(", *ending],
        ["run", chat_bundle, "-p", "def f(", *going_on],
        ["run", chat_bundle, "-p", "def f(", *ending, "-q"],
    ):
        result = invoke(*quiet)
        assert result.exit_code == 0, result.output
        assert hint not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chat", "a", "-p", "b"], "both --chat and a prompt were given"),
        (["--system", "a", "-p", "b"], "--system is given without --chat"),
        (["--chat", "a"], "has no chat template"),
    ],
)
def test_what_is_no_chat_is_refused(bundle, invoke, arguments, message) -> None:
    result = invoke("run", bundle, *arguments)
    assert result.exit_code != 0
    assert message in result.stderr
    assert "hint:" in result.stderr


def test_a_model_without_a_template_says_so(bundle, invoke) -> None:
    assert "has no chat template" in invoke("chat", bundle, stdin="a\n").stderr
    with pytest.raises(BundleError, match="has no chat template"):
        ojfa_export.load(bundle).chat([{"role": "user", "content": "a"}])


def test_a_damaged_template_is_no_chat(chat_bundle, tmp_path) -> None:
    copy = BundleCopy(chat_bundle, tmp_path / "copy.ojfa")
    copy.own("chat.json").write_text("{}")
    copy.sign("chat.json")
    with pytest.raises(BundleError, match=r"chat.json is damaged: templates"):
        ojfa_export.load(copy.directory).render([{"role": "user", "content": "a"}])


def test_a_question_that_cannot_be_answered_ends_no_chat(chat_bundle, invoke) -> None:
    args = ["chat", chat_bundle, "--exit", "full", "--max-new-tokens", 3]
    right = invoke(*args, stdin="one\ntwo\n").stdout
    result = invoke(*args, stdin=b"one\n" + b"long " * 2000 + b"\n\xff\xfe\ntwo\n")
    assert result.exit_code == 1
    assert result.stdout == right
    assert result.stderr.count("error: ") == result.stderr.count("hint: ") == 2
    assert "tokens, the cache holds" in result.stderr


def test_an_empty_question_is_refused(chat_bundle, invoke) -> None:
    result = invoke("run", chat_bundle, "--chat", " ")
    assert result.exit_code == 2
    assert "the question is empty" in result.stderr
