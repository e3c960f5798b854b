"""Reading a Hugging Face config so that no field that matters is overlooked."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ojfa_export.errors import CheckpointError

# Fields that describe training, files or the caller, and never change what the model computes, by
# what they hold. Anything else in them is refused as transformers refuses it.
_IRRELEVANT: Mapping[tuple[type, ...], str] = {
    (
        int,
        float,
    ): "attention_dropout attn_pdrop classifier_dropout embd_pdrop hidden_dropout resid_pdrop "
    "summary_first_dropout",
    (int,): "_num_labels bos_token_id chunk_size_feed_forward decoder_start_token_id n_ctx "
    "pad_token_id sep_token_id unk_token_id",
    (bool,): "_attn_implementation_autoset gradient_checkpointing is_llama_config "
    "output_attentions output_hidden_states return_dict summary_proj_to_labels summary_use_proj "
    "unsloth_fixed use_cache",
    (str,): "_attn_implementation _commit_hash _model_name_or_path _name_or_path "
    "cache_implementation finetuning_task "
    "model_type "
    "prefix problem_type summary_activation summary_type tokenizer_class "
    "transformers_version unsloth_version",
    (dict,): "auto_map id2label label2id task_specific_params transformers.js_config",
    (list,): "architectures",
    (int, list): "eos_token_id",
}
IRRELEVANT_FIELDS: Mapping[str, tuple[type, ...]] = {
    name: kinds for kinds, names in _IRRELEVANT.items() for name in names.split()
}
# How text is generated, of which old config.json files speak: nothing of the model itself.
_GENERATION = (
    "assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens "
    "diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
    "encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty "
    "forced_bos_token_id forced_eos_token_id length_penalty max_length min_length "
    "no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups "
    "num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty "
    "return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p "
    "typical_p"
)
GENERATION_FIELDS = frozenset(_GENERATION.split())
_KINDS: Mapping[type, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "an object",
    list: "a list",
}

# More blocks than any model has; the C++ runtime refuses them too.
MOST_BLOCKS = 65_536
# Features of one head; its angles are computed to be checked.
MOST_FEATURES = 65_536
# Beyond it, or below its inverse, a factor would leave nothing of what it multiplies in fp16.
LARGEST_FACTOR = 1e4
# The field that says how weights are quantised.
QUANTISATION = "quantization_config"
# Of what the checkpoint was saved in; the tensors say their own.
STORED_DTYPES = ("float32", "float16", "bfloat16", "float64")
# transformers makes a name for each, though a language model has none.
MOST_LABELS = 65_536

COMPLETE = "check that the checkpoint's config.json is complete"


class Config:
    """A config.json that knows which of its fields have been understood.

    Args:
        fields: The JSON object.
        source: Where it was read, for messages.
        ignored: Fields that the user says change nothing.
    """

    def __init__(
        self, fields: Mapping[str, Any], source: str, ignored: Collection[str] = ()
    ) -> None:
        self.fields = dict(fields)
        self.source = source
        self.ignored = frozenset(ignored)
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value, or the default where it is absent or null."""
        self._read.add(name)
        value = self.fields.get(name)
        return default if value is None else value

    def wrong(self, name: str, what: str, value: object) -> CheckpointError:
        """The error for a field that is not what it must be."""
        return CheckpointError(
            f"{self.source}: field '{name}' must be {what}, not {value!r:.60}", hint=COMPLETE
        )

    def integer(
        self, name: str, default: int | None = None, most: int = 2**31 - 1, least: int = 1
    ) -> int:
        """An integer field, positive where nothing else is said.

        Raises:
            CheckpointError: Where it is absent without a default, or not in least .. most.
        """
        value = self.get(name, default)
        if type(value) is int and value < least == 0:
            raise self.wrong(name, "an integer from 0 on", value)
        if type(value) is not int or value < least:
            raise self.wrong(name, "a positive integer", value)
        if value > most:
            raise self.wrong(name, f"a positive integer up to {most}", value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A true/false field."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def fraction(self, name: str, default: float) -> float:
        """A real number from 0 to 1, such as what a norm adds to a variance.

        Raises:
            CheckpointError: It is anything else.
        """
        value = self.get(name, default)
        if not isinstance(value, float) or not 0 <= value <= 1:
            raise self.wrong(name, "a real number from 0 to 1", value)
        return value

    def factor(self, name: str, default: float = 1.0) -> float:
        """A positive number that something is multiplied with, within what any model has.

        Raises:
            CheckpointError: It is anything else.
        """
        value = self.get(name, default)
        if type(value) not in (int, float) or not 1 / LARGEST_FACTOR <= value <= LARGEST_FACTOR:
            what = f"a number from {1 / LARGEST_FACTOR:g} to {LARGEST_FACTOR:g}"
            raise self.wrong(name, what, value)
        return float(value)

    def softcap(self, name: str, default: float | None) -> float | None:
        """What values are kept within; None where the config says null, which here isn't absent.

        Raises:
            CheckpointError: It is no positive real number, or beyond what any model has.
        """
        self._read.add(name)
        given = self.fields.get(name, default)
        if given is not None and not isinstance(given, float):
            raise self.wrong(name, "a real number or null", given)
        return None if given is None else self.factor(name, given)

    def require(self, name: str, *allowed: Any) -> None:
        """Refuses the checkpoint unless the field is absent, null or one of the values."""
        value = self.get(name)
        same = (type(value) is type(each) and value == each for each in allowed)
        if value is not None and not any(same):
            raise CheckpointError(
                f"{self.source}: field '{name}' is {value!r:.60}, which is not supported",
                hint=f"supported: {', '.join(map(repr, allowed))}"
                if allowed
                else f"supported: checkpoints without '{name}'",
            )

    def unread(self, harmless: Collection[str]) -> list[str]:
        """Fields with a value that nobody has read, and that are not among these or ignored."""
        known = self._read | self.ignored | set(harmless)
        return sorted(
            name for name, value in self.fields.items() if name not in known and value is not None
        )

    def refuse_unread(self, family: str) -> None:
        """Refuses fields that nobody understood: they could change the result.

        Raises:
            CheckpointError: Naming the fields, one that doesn't matter and holds nonsense, or one
                that is understood and was to be ignored.
        """
        for name in sorted(self.ignored & self._read & self.fields.keys()):
            raise CheckpointError(
                f"{self.source}: field '{name}' is understood for family '{family}', and can't be "
                "ignored",
                hint=f"leave out --ignore-config-field {name}",
            )
        self._check_irrelevant()
        unknown = self.unread(IRRELEVANT_FIELDS.keys() | GENERATION_FIELDS)
        if unknown:
            raise CheckpointError(
                f"{self.source}: fields not understood for family '{family}': "
                + f"{', '.join(unknown):.500}",
                hint="they could change what the model computes; if you know that they don't, "
                f"give --ignore-config-field {unknown[0]:.60}"
                + (" and so on" if len(unknown) > 1 else ""),
            )

    def _check_irrelevant(self) -> None:
        """What doesn't matter here is nonsense to transformers all the same."""
        self.integer("num_labels", 2, MOST_LABELS)
        self.fraction("initializer_range", 0.02)
        for name in ("dtype", "torch_dtype"):
            self.require(name, *STORED_DTYPES)
        for name in (self.fields.keys() & IRRELEVANT_FIELDS.keys()) - self.ignored:
            value, kinds = self.fields[name], IRRELEVANT_FIELDS[name]
            if value is not None and type(value) not in kinds:
                raise self.wrong(name, " or ".join(_KINDS[kind] for kind in kinds), value)
        labels = self.get("id2label", {})
        if not all(re.fullmatch("[0-9]{1,9}", key) for key in labels):
            raise self.wrong("id2label", "an object whose names are numbers", labels)
