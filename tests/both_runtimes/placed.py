"""Where each name of one runtime's interface is in the other's, or why it isn't there.

Names that are the same in both need no line here.
"""

from __future__ import annotations

import re

# What a Python name is called in C++, by the first pattern that fits, if it is called so there.
ALIKE = (
    (r"load\((\w+)\)", r"LoadOptions::\1"),
    (r"Model\.session\((\w+)\)", r"SessionOptions::\1"),
    (r"Model\.(?:generate|stream)\((\w+)\)", r"GenerateOptions::\1"),
    (r"ExitPolicy\.(\w+)", r"Policy::\1"),
    (r"Token\.(\w+)", r"Step::\1"),
    (r"Step\.(\w+)", r"Decision::\1"),
    (r"(\w+)\.(\w+)(\(\w+\))?", r"\1::\2\3"),
)

GENERATE = ("Session::generate", "Session::generate_batch")
PROMPTS = ("Session::generate(prompt)", "Session::generate_batch(prompts)")
SHADOW = ("SessionOptions::shadow_share", "SessionOptions::shadow_seed")

# What has another name.
RENAMED: dict[str, tuple[str, ...]] = {
    "load": ("Model::load",),
    "load(bundle)": ("Model::load(bundle)",),
    "Model.spec": ("Model::info", "ojfa_model_info::hidden_size", "ojfa_model_info::vocab_size"),
    "Model.manifest": ("ojfa_model_info::max_length", "ojfa_model_info::max_batch_size"),
    "Model.blocks": ("Model::blocks", "ojfa_model_info::blocks"),
    "Model.auto_policy": ("Model::policy", "ojfa_model_info::auto_exits"),
    "Model.generate": GENERATE,
    "Model.generate(prompts)": PROMPTS,
    "Model.generate(speculate)": ("GenerateOptions::speculation",),
    "Model.generate(stop_token_ids)": ("GenerateOptions::stop_tokens",),
    "Model.stream(stop_token_ids)": ("GenerateOptions::stop_tokens",),
    "Model.stream": (*GENERATE, "Generation::next", "Generation::begin", "Generation::end"),
    "Model.stream(prompts)": PROMPTS,
    "Model.stream(speculate)": ("GenerateOptions::speculation",),
    "Model.session(monitor)": SHADOW,
    "Monitor.shadow": (*SHADOW, "SessionOptions::shadow_index"),
    "Model.monitor(share)": ("SessionOptions::shadow_share",),
    "Model.monitor(seed)": ("SessionOptions::shadow_seed",),
    "Model.monitor(on_event)": ("ojfa_session_listen",),
    "Session.on_event": ("ojfa_session_listen",),
    "Session.shadow": ("Session::shadow_loss", "Session::shadow_loss(row)"),
    "Session.advance(token_ids)": ("Session::advance(tokens)", "Session::advance_every(tokens)"),
    "Session.advance(exit)": ("Session::advance(exit)", "Session::advance_every(exit)"),
    "Session.advance(every_position)": ("Session::advance_every",),
    "Session.decide(token_ids)": ("Session::decide(tokens)",),
    "Session.complete(token_ids)": ("Session::complete(tokens)",),
    "Session.stats": ("Session::stats", "Session::reset_stats"),
    "Step.logits": ("Answer::logits",),
    "Token.id": ("Step::token",),
    "Token.finish_reason": ("Step::finish",),
}

TEXT = "text stays with the caller's tokenizer"
ONE_TOKEN = "a generation of one token gives the same"
STEPS = "a step in two halves; a generation begins steps ahead by itself"
LOGITS = "logits are adjusted on the host, and C++ leaves them on the device"
PROMISE = "who watches a promise in C++ sends its log to `ojfa-export monitor`"
PARTS = "of the runtime's own parts"
DERIVED = "follows from the other counts"
CALLER = "the caller gave it"
OWN = "C++ takes a caller's values alone, and none of the bundle's own"

LAYER = "C++ runs no draft layers yet; it drafts at an exit of such a bundle"
CHATS = "the C++ runtime has no templates: give it token ids of `Model.chats`"
PYTHON_ONLY: dict[str, str] = {
    "Model.encode": TEXT,
    "Model.tokenizer": TEXT,
    "Model.chat": CHATS,
    "Model.chats": CHATS,
    "Model.render": CHATS,
    "Token.text": TEXT,
    "Model.generate(stop)": TEXT,
    "Model.stream(stop)": TEXT,
    "Model.default": "`Exit::planned()` does it, and doesn't show it",
    "Model.bundle": PARTS,
    "Model.engines": PARTS,
    "Model.generate(monitor)": PROMISE,
    "Model.generate(domain)": PROMISE,
    "Model.stream(monitor)": PROMISE,
    "Model.stream(domain)": PROMISE,
    **{
        f"Model.{method}({option})": LOGITS
        for method in ("generate", "stream")
        for option in (
            *("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
            *("logit_bias", "logprobs"),
        )
    },
    "Model.generate(sample)": OWN,
    "Model.stream(sample)": OWN,
    "Model.generate(options)": "the same options in one object",
    "Model.stream(options)": "the same options in one object",
    "Model.resolve_exit": PARTS,
    "Model.resolve_default": PARTS,
    "Model.resolve_speculation": PARTS,
    "Model.session(drafts)": LAYER,
    "Model.drafts": LAYER,
    "Model.exits": "C++ runs no block jumps; of any other bundle all exits are there",
    "Session.exits": "the model has it",
    "Token.logprobs": LOGITS,
    "Engine": "in C++ a session for each request; an engine of its own comes later",
    "Model.monitor": PROMISE,
    "Model.monitor(false_alarms)": PROMISE,
    "Monitor.watch": PROMISE,
    "Monitor.check_domain": PROMISE,
    "Monitor.finish": PROMISE,
    "Monitor.disagreement": PROMISE,
    "Monitor.stats": PROMISE,
    "Session.choose": ONE_TOKEN,
    "Session.start": STEPS,
    "Session.can_follow": STEPS,
    "Session.follow": STEPS,
    "Session.finish": STEPS,
    "Session.deepen(every_position)": "no one has asked for it",
    "Session.has_drafts": LAYER,
    "Session.can_propose": LAYER,
    "Session.propose": LAYER,
    "Session.propose_logits": LAYER,
    "Session.propose_and_complete": LAYER,
    "Session.proposes_at_once": LAYER,
    "Session.begin_round": LAYER,
    "Session.finish_round": LAYER,
    "Session.complete_greedily": "speculation does it by itself",
    "Session.spec": "the model has it",
    "Session.confidence": "a decision has it",
    "Session.max_length": CALLER,
    "Choice.tokens": ONE_TOKEN,
    "Choice.blocks_run": ONE_TOKEN,
    "Choice.confidence": ONE_TOKEN,
    "Stats.add": "the caller adds",
    "Stats.count_head": PARTS,
    "Stats.count_stopped": PARTS,
    "Stats.mean_blocks": DERIVED,
    "Stats.acceptance_rate": DERIVED,
    "Stats.tokens_per_full_pass": DERIVED,
    "Stats.mean_confidence": DERIVED,
}

DEVICE = "Python's backends use the current device"
ON_HOST = "Python gives logits always, and who wants tokens alone calls `Session.choose`"
CPP_ONLY: dict[str, str] = {
    "LoadOptions::device": DEVICE,
    "LoadOptions::backend_library": "a backend in Python is a package",
    "LoadOptions::memory_limit": "services share a device",
    "LoadOptions::check_golden": "`ojfa-export verify` does it",
    "LoadOptions::progress": "for services that show how far they are",
    "LoadOptions::blocks": "weights are copied while their files are read",
    "Model::load_blocks": "in Python what generates does it",
    "Model::memory": "services share a device",
    "Model::backend": "`ojfa-export inspect` and `doctor` say it",
    "Session::advance(logits)": ON_HOST,
    "Session::decide(logits)": ON_HOST,
    "Session::deepen(logits)": ON_HOST,
    "Answer::likeliest": ON_HOST,
    "Session::cancel": "from another thread; in Python an interrupt does it",
    "Session::handle": "for calls of the C interface",
    "Generation::Iterator": "what a range needs",
    "Policy::view": "for calls of the C interface",
    "ojfa_model_info::eos_tokens": "in Python of `Model.spec`",
    "ojfa_version": "in Python `ojfa_export.__version__`",
}


def called_alike(name: str, cpp: set[str]) -> str | None:
    """A Python name's own counterpart in C++, if it has one of the same name."""
    for pattern, replacement in ALIKE:
        found = re.fullmatch(pattern, name)
        if found and (candidate := found.expand(replacement)) in cpp:
            return candidate
    return None
