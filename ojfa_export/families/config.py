"""Reading a Hugging Face config so that no field that matters is overlooked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ojfa_export.errors import CheckpointError

# Fields that describe training, files or the caller, and never change what the model computes.
IRRELEVANT_FIELDS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures
    attention_dropout attn_pdrop auto_map bos_token_id chunk_size_feed_forward
    decoder_start_token_id
    dtype embd_pdrop eos_token_id finetuning_task gradient_checkpointing id2label
    initializer_range label2id model_type n_ctx num_labels output_attentions output_hidden_states
    pad_token_id prefix problem_type resid_pdrop return_dict sep_token_id summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    task_specific_params tokenizer_class torch_dtype transformers_version unsloth_version
    unsloth_fixed use_cache
    """.split()  # noqa: SIM905 - a list of quoted names would be twice as long
)


COMPLETE = "check that the checkpoint's config.json is complete"


class Config:
    """A config.json that knows which of its fields have been understood.

    Args:
        fields: The JSON object.
        source: Where it was read, for messages.
    """

    def __init__(self, fields: Mapping[str, Any], source: str) -> None:
        self.fields = dict(fields)
        self.source = source
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value, or the default where it is absent or null."""
        self._read.add(name)
        value = self.fields.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer field.

        Raises:
            CheckpointError: Where it is absent without a default, or not a positive integer.
        """
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise CheckpointError(
                f"{self.source}: field '{name}' must be a positive integer, not {value!r}",
                hint=COMPLETE,
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A true/false field."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{self.source}: field '{name}' must be true or false, not {value!r}",
                hint=COMPLETE,
            )
        return value

    def number(self, name: str, default: float) -> float:
        """A real-valued field."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(
                f"{self.source}: field '{name}' must be a number, not {value!r}", hint=COMPLETE
            )
        return float(value)

    def require(self, name: str, *allowed: Any) -> None:
        """Refuses the checkpoint unless the field is absent, null or one of the values."""
        value = self.get(name)
        if value is not None and value not in allowed:
            raise CheckpointError(
                f"{self.source}: field '{name}' is {value!r}, which is not supported",
                hint=f"supported: {', '.join(map(repr, allowed))}"
                if allowed
                else f"supported: checkpoints without '{name}'",
            )

    def refuse_unread(self, family: str) -> None:
        """Refuses fields that nobody understood: they could change the result.

        Raises:
            CheckpointError: Naming the fields.
        """
        unknown = sorted(
            name
            for name, value in self.fields.items()
            if name not in self._read and name not in IRRELEVANT_FIELDS and value is not None
        )
        if unknown:
            raise CheckpointError(
                f"{self.source}: fields not understood for family '{family}': {', '.join(unknown)}",
                hint="they could change what the model computes; remove them from config.json "
                "only if you know that they don't",
            )
