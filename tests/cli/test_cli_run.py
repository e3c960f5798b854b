"""`run` on a real bundle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ojfa_export
from ojfa_export.bundle.manifest import read_manifest
from ojfa_export.bundle.names import MANIFEST
from ojfa_export.cli.console import Console
from ojfa_export.decoding.generation_defaults import GenerationDefaults
from ojfa_export.runtime.generation import Token

PROMPT = "def main("


def test_one_prompt_goes_to_standard_output_with_its_continuation(invoke, bundle: Path) -> None:
    result = invoke("run", bundle, "-p", PROMPT, "--max-new-tokens", 8)
    assert result.exit_code == 0, result.stderr
    expected = ojfa_export.load(bundle).generate(PROMPT, max_new_tokens=8).prompts[0].text
    assert result.stdout == f"{PROMPT}{expected}\n"
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith(" ms, exit full\n")


def test_json_is_the_whole_generation(invoke, bundle: Path) -> None:
    result = invoke("run", bundle, "-p", PROMPT, "-p", "a", "--exit", 2, "--json",
                    "--max-new-tokens", 6)  # fmt: skip
    document = json.loads(result.stdout)
    expected = ojfa_export.load(bundle).generate([PROMPT, "a"], exit=2, max_new_tokens=6)
    assert [prompt["prompt"] for prompt in document["prompts"]] == [PROMPT, "a"]
    for shown, made in zip(document["prompts"], expected.prompts, strict=True):
        for name in ("prompt_token_ids", "token_ids", "text", "exit_blocks", "finish_reason"):
            assert shown[name] == getattr(made, name)
        assert shown["exit_blocks"] == [2] * len(made.token_ids)
    assert document["tokens_per_second"] > 0
    assert document["time_to_first_token_ms"] > 0


def test_several_prompts_are_printed_under_headings(invoke, bundle: Path) -> None:
    result = invoke("run", bundle, "-p", PROMPT, "-p", "[b]a[/b] :+1:", "-q", "--max-new-tokens", 4)
    made = ojfa_export.load(bundle).generate([PROMPT, "[b]a[/b] :+1:"], max_new_tokens=4).prompts
    assert result.stdout == (
        f"== 1 of 2: {PROMPT!r}\n{made[0].text}\n== 2 of 2: '[b]a[/b] :+1:'\n{made[1].text}\n"
    )
    assert result.stderr == ""


def test_sampling_options_reach_the_model(invoke, bundle: Path) -> None:
    options = {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "seed": 11}
    args = [word for name, value in options.items()
            for word in (f"--{name.replace('_', '-')}", value)]  # fmt: skip
    result = invoke("run", bundle, "-p", PROMPT, "--json", "--max-new-tokens", 12, *args)
    expected = ojfa_export.load(bundle).generate(PROMPT, max_new_tokens=12, **options)
    assert json.loads(result.stdout)["prompts"][0]["token_ids"] == expected.prompts[0].token_ids


def test_every_option_of_generation_reaches_the_model(invoke, bundle: Path) -> None:
    options = {
        "temperature": 0.9, "min_p": 0.02, "seed": 4, "repetition_penalty": 1.4,
        "presence_penalty": 0.3, "frequency_penalty": -0.2, "logit_bias": {7: 2.5, 30: -4.0},
        "stop_token_ids": (9, 41), "ignore_eos": True, "logprobs": 2, "max_new_tokens": 30,
        "exit": 3, "top_k": 200, "top_p": 0.99, "stop": ("==", "zz"),
    }  # fmt: skip
    args: list[object] = ["--ignore-eos"]
    for name, value in (("logit-bias", "7=2.5"), ("logit-bias", "30=-4"), ("stop-token", 9),
                        ("stop-token", 41), ("stop", "=="), ("stop", "zz")):  # fmt: skip
        args += [f"--{name}", value]
    for name, value in options.items():
        if not isinstance(value, dict | tuple | bool):
            args += [f"--{name.replace('_', '-')}", value]
    [expected] = ojfa_export.load(bundle).generate([5, 6, 7], **options).prompts
    document = json.loads(invoke("run", bundle, "--prompt-ids", "5,6,7", "--json", *args).stdout)
    [found] = document["prompts"]
    assert found["prompt_token_ids"] == [5, 6, 7]
    assert found["prompt"] == ojfa_export.load(bundle).tokenizer.decode([5, 6, 7])
    for name in ("token_ids", "text", "finish_reason", "exit_blocks"):
        assert found[name] == getattr(expected, name)
    assert [each["logprob"] for each in found["logprobs"]] == [
        each.logprob for each in expected.logprobs
    ]
    assert [len(each["top"]) for each in found["logprobs"]] == [2] * len(expected.token_ids)


def test_token_ids_make_a_batch_as_texts_do(invoke, bundle: Path) -> None:
    model = ojfa_export.load(bundle)
    ids = [model.encode(PROMPT), model.encode("a")]
    listed = [part for each in ids for part in ("--prompt-ids", ",".join(map(str, each)))]
    by_ids = invoke("run", bundle, *listed, "-q", "--max-new-tokens", 5)
    by_text = invoke("run", bundle, "-p", PROMPT, "-p", "a", "-q", "--max-new-tokens", 5)
    assert by_ids.stdout == by_text.stdout != ""


def test_prompts_are_encoded_and_defaults_resolved_once(invoke, bundle: Path, monkeypatch) -> None:
    from ojfa_export.runtime.model import Model
    from ojfa_export.runtime.prompts import PromptEncoder

    calls = []
    for owner, name in ((PromptEncoder, "_encode"), (Model, "default")):
        original = getattr(owner, name)

        def counted(self, *args, _name=name, _original=original, **named):
            calls.append(_name)
            return _original(self, *args, **named)

        monkeypatch.setattr(owner, name, counted)
    assert invoke("run", bundle, "-p", PROMPT, "--max-new-tokens", 2).exit_code == 0
    assert sorted(calls) == ["_encode", "default"]


def test_exit_auto_of_a_bundle_without_a_policy(invoke, bundle: Path) -> None:
    result = invoke("run", bundle, "-p", PROMPT, "--exit", "auto")
    assert result.exit_code == 1
    assert "has no exit policy for 'auto'" in result.stderr


def test_exit_auto_follows_the_bundles_policy(invoke, bundle_with_policy: Path) -> None:
    model = ojfa_export.load(bundle_with_policy)
    expected = model.generate(PROMPT, exit=model.manifest.auto, max_new_tokens=30).prompts[0]
    assert len(set(expected.exit_blocks)) > 1
    result = invoke("run", bundle_with_policy, "-p", PROMPT, "--exit", "auto", "--json",
                    "--max-new-tokens", 30)  # fmt: skip
    document = json.loads(result.stdout)
    assert document["exit"] == "auto"
    assert document["prompts"][0]["exit_blocks"] == expected.exit_blocks
    assert document["prompts"][0]["token_ids"] == expected.token_ids
    result = invoke("run", bundle_with_policy, "-p", PROMPT, "--exit", "auto",
                    "--max-new-tokens", 30)  # fmt: skip
    mean = sum(expected.exit_blocks) / len(expected.exit_blocks)
    assert result.stderr.endswith(f"exit auto, {mean:.1f} blocks/token\n")


@pytest.mark.parametrize("options", [[], ["--draft-exit", 3, "--draft-length", 2]])
def test_speculation_gives_the_tokens_of_full_depth(invoke, bundle: Path, options) -> None:
    expected = ojfa_export.load(bundle).generate(PROMPT, max_new_tokens=12).prompts[0]
    result = invoke("run", bundle, "-p", PROMPT, "--max-new-tokens", 12, "--speculate", *options)
    assert result.stdout == f"{PROMPT}{expected.text}\n"
    assert result.stderr.endswith(" tokens per full pass\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draft-exit", 2], "are settings of speculation"),
        (["--speculate", "--exit", 2], "an exit was asked for"),
        (["--speculate", "--draft-exit", 99], "exit 99 can't draft"),
    ],
)
def test_speculation_options_that_make_no_sense(invoke, bundle: Path, options, message) -> None:
    result = invoke("run", bundle, "-p", PROMPT, *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_shadow_checks_are_told(invoke, bundle: Path) -> None:
    args = ["run", bundle, "-p", PROMPT, "--exit", 1, "--max-new-tokens", 9, "--shadow-share", 1]
    monitor = ojfa_export.Monitor(1.0)
    model = ojfa_export.load(bundle)
    expected = model.generate(PROMPT, exit=1, max_new_tokens=9, monitor=monitor).prompts[0]
    document = json.loads(invoke(*args, "--json").stdout)
    differ = monitor.stats.shadow_disagreements
    assert document["prompts"][0]["token_ids"] == expected.token_ids
    assert document["shadow"] == {"checks": 9, "disagreements": differ}
    told = invoke(*args).stderr
    assert told.endswith(f"9 early tokens were compared with the full model, {differ} differ\n")
    assert invoke(*args[:-1], 1.5).exit_code == 2


def test_stop_string_that_is_a_special_token(invoke, bundle: Path) -> None:
    forced = ("--logit-bias", "0=10000", "--ignore-eos", "--stop", "<|endoftext|>")
    result = invoke("run", bundle, "-p", PROMPT, *forced, "--json", "--max-new-tokens", 24)
    completion = json.loads(result.stdout)["prompts"][0]
    assert (completion["finish_reason"], completion["token_ids"]) == ("stop_string", [0])


def test_stop_strings_reach_the_model(invoke, bundle: Path) -> None:
    text = ojfa_export.load(bundle).generate(PROMPT, max_new_tokens=24).prompts[0].text
    stop = next(char for char in text if char.isprintable())
    result = invoke("run", bundle, "-p", PROMPT, "--stop", stop, "--json", "--max-new-tokens", 24)
    completion = json.loads(result.stdout)["prompts"][0]
    assert completion["text"] == text.partition(stop)[0]
    assert completion["finish_reason"] == "stop_string"


def test_sampling_options_without_effect_are_remarked_on(invoke, bundle: Path) -> None:
    result = invoke("run", bundle, "-p", PROMPT, "--top-k", 5, "--max-new-tokens", 1)
    assert "no effect at --temperature 0" in result.stderr
    result = invoke("run", bundle, "-p", PROMPT, "--logprobs", 1, "--max-new-tokens", 1)
    assert "--logprobs are shown with --json only" in result.stderr


@pytest.mark.parametrize(
    ("stdin", "prompt"), [("import os\n", "import os"), ("a\n\n", "a\n"), ("é", "é")]
)
def test_dash_reads_standard_input(invoke, bundle: Path, stdin: str, prompt: str) -> None:
    result = invoke("run", bundle, "-p", "-", "--json", "--max-new-tokens", 1, stdin=stdin.encode())
    assert json.loads(result.stdout)["prompts"][0]["prompt"] == prompt


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["-p", "-", "-p", "-"], b"a", "-p - is given more than once"),
        (["-p", "-"], b"abc\xff", "standard input is not text in UTF-8: byte 3 can't be read"),
        (["-p", "a\udcff"], b"", "a prompt is not text in UTF-8"),
        (["-p", ""], b"", "the prompt is empty"),
        (["-p", "-"], b"\n", "the prompt is empty"),
        (["-p", "a" * 400], b"", "the prompt has "),
        (["-p", "a", "--exit", "5"], b"", "exit 5 is outside this model's 1..4"),
        (["-p", "a", "--temperature", "1", "--top-p", "0"], b"", "top-p must be above 0"),
        (["-p", "a", "--backend", "abacus"], b"", "backend 'abacus' is not known"),
        ([], b"", "no prompt was given"),
        (["-p", "a", "--prompt-ids", "1"], b"", "both -p and --prompt-ids were given"),
        (["--prompt-ids", "1,a"], b"", "'1,a' is not a list of token ids"),
        (["--prompt-ids", "1,320"], b"", "the prompt has token ids outside 0..319"),
        (["-p", "a", "--logit-bias", "5"], b"", "'5' is not TOKEN=X"),
        (["-p", "a", "--logit-bias", "-5=1"], b"", "a token id of logit-bias must be 0 or more"),
        (["-p", "a", "--logit-bias", "320=1"], b"", "logit_bias has token ids outside 0..319"),
        (["-p", "a", "--logit-bias", "5=nan"], b"", "a value of logit-bias must be between"),
        (["-p", "a", "--stop-token", "320"], b"", "stop_token_ids has token ids outside 0..319"),
        (["-p", "a", "--stop", ""], b"", "a stop string is empty"),
        (["-p", "a", "--min-p", "2"], b"", "min-p must be between 0 and 1, not 2"),
        (["-p", "a", "--repetition-penalty", "0"], b"", "repetition-penalty must be between"),
        (["-p", "a", "--presence-penalty", "inf"], b"", "presence-penalty must be between"),
        (["-p", "a", "--logprobs", "21"], b"", "logprobs must be between 0 and 20, not 21"),
        (
            ["-p", "a", "--speculate", "--logit-bias", "5=1"],
            b"",
            "can't be combined with speculation",
        ),
    ],
)
def test_bad_input(invoke, bundle: Path, args, stdin: bytes, message: str) -> None:
    result = invoke("run", bundle, *args, stdin=stdin)
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    first, second = result.stderr.splitlines()[0], result.stderr.splitlines()[1:]
    assert first.startswith("error: ")
    assert message in first
    assert all(line.startswith("hint: ") for line in second)


@pytest.mark.parametrize("json_output", [False, True])
def test_interrupt_keeps_what_was_generated(
    invoke, bundle: Path, monkeypatch: pytest.MonkeyPatch, json_output: bool
) -> None:
    def interrupted(*_: object):
        yield Token(0, 5, " one", 4, None)
        yield Token(0, 6, " two", 4, None)
        raise KeyboardInterrupt

    monkeypatch.setattr("ojfa_export.runtime.model.generate_tokens", interrupted)
    result = invoke("run", bundle, "-p", "count", *(["--json"] if json_output else []))
    assert result.exit_code == 130
    if json_output:
        error = {"message": "interrupted", "hint": None, "exit_status": 130}
        assert json.loads(result.stdout) == {"error": error}
    else:
        assert result.stdout == "count one two\n"
    assert result.stderr.endswith("error: interrupted\n")
    assert "Traceback" not in result.stderr


def test_interrupt_by_signal(bundle: Path) -> None:
    # So long that the process is in the middle of a generation whenever it is hit.
    program = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a parent may ignore it
        "from ojfa_export.runtime import generation, model\n"
        "def long(*_):\n"
        "    for _ in range(20_000):\n"
        "        yield generation.Token(0, 5, 'x', 4, None)\n"
        "        time.sleep(0.001)\n"
        "model.generate_tokens = long\n"
        "from ojfa_export.cli import main\n"
        "main()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, "run", str(bundle), "-p", "a"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        begun = process.stdout.read(3)
        os.kill(process.pid, signal.SIGINT)
        shown, told = process.stdout.read(), process.stderr.read().decode()
    assert begun == b"axx", told
    assert shown.lstrip(b"x") == b"\n"
    assert process.returncode == 130
    assert told.endswith("error: interrupted\n")
    assert "Traceback" not in told


def test_text_comes_as_it_is_made(invoke, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    before_the_second: list[str] = []

    def watched(*_: object):
        yield Token(0, 5, " one", 4, None)
        before_the_second.extend(written)
        yield Token(0, 6, " two", 4, "max_new_tokens")

    monkeypatch.setattr(Console, "write", lambda _, text: written.append(text))
    monkeypatch.setattr("ojfa_export.runtime.model.generate_tokens", watched)
    invoke("run", bundle, "-p", "count")
    assert before_the_second == ["count", " one"]
    assert written == ["count", " one", " two", "\n"]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams(tiny_bundle: Path, closed: str) -> None:
    """A service manager may close them all: no internal error, and what can be said is said."""
    prompt = "-" if closed == "<&-" else "x"
    command = f"{sys.executable} -m ojfa_export run '{tiny_bundle}' -p {prompt} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    if closed == "<&-":
        assert done.returncode == 2
        assert done.stderr.startswith("error: standard input is closed\nhint: ")
    else:
        assert done.returncode == 0, done.stderr
        assert bool(done.stdout) == (closed == "2>&-")


def test_what_the_checkpoint_says_of_generation(invoke, bundle: Path, tmp_path: Path) -> None:
    """Greedy unless asked; `inspect` shows the values, `run` says which hold."""
    own = GenerationDefaults(temperature=0.7, top_k=5, repetition_penalty=1.3, suppress_tokens=(7,))
    output = shutil.copytree(bundle, tmp_path / "own.ojfa")
    manifest = read_manifest(output).model_copy(update={"generation": own})
    (output / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    shown = invoke("inspect", output).stdout
    assert "repetition penalty 1.3, 1 tokens never chosen" in shown
    assert "temperature 0.7, top-k 5" in shown
    assert json.loads(invoke("inspect", output, "--json").stdout)["generation"]["top_k"] == 5
    model = ojfa_export.load(bundle)
    for args, options in (
        ((), {}),
        (("--sample",), {"temperature": 0.7, "top_k": 5}),
        (("--sample", "--top-k", "9", "--seed", "4"), {"temperature": 0.7, "top_k": 9, "seed": 4}),
        (("--temperature", "0.2"), {"temperature": 0.2, "top_k": 5}),
        (("--repetition-penalty", "1"), {"repetition_penalty": 1.0}),
    ):
        result = invoke("run", output, "-p", PROMPT, "--max-new-tokens", 12, "--json", *args)
        options = {"repetition_penalty": 1.3, "logit_bias": {7: -1e4}, **options}
        expected = model.generate(PROMPT, max_new_tokens=12, **options).prompts[0]
        assert json.loads(result.stdout)["prompts"][0]["token_ids"] == expected.token_ids, args
        assert "from generation_config.json: repetition penalty 1.3" in result.stderr
        assert ("temperature 0.7, top-k 5" in result.stderr) == ("temperature" in options)
    refused = invoke("run", output, "-p", PROMPT, "--sample", "--temperature", "0")
    assert refused.exit_code == 2
