"""How large the steps of a training are: decided by the text and the model, then by the memory."""

from __future__ import annotations

from dataclasses import dataclass

from ojfa_export.models.spec import ModelSpec

# Tokens that a step reads: this many for much text, fewer for little, so that there are enough
# steps all the same.
STEP_TOKENS = 2048, 16_384
STEPS = 1200
# Of a step's tokens, one in so many counts for the loss: neighbours say much the same, and the LM
# head costs more than the jump.
ONE_IN = 4
# Outputs of a jump that a step looks at, at most.
OUTPUTS_AT_ONCE = 5
CHECKS = 12
# Held out: an eighth at most, and no more than these windows, of whose tokens these are measured.
HELD_OUT_SHARE, HELD_OUT_WINDOWS, HELD_OUT_TOKENS = 8, 64, 8192
# Of those windows, what each check sees: checks must not take longer than training.
CHECKED_WINDOWS = 16
# Logits at once, and of the memory that the weights leave, what the states of a pass may take.
LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}
STATES_SHARE = 0.4
CPU_STATES_BYTES = 1 << 29


@dataclass(frozen=True)
class Sizes:
    """How large the steps are.

    Attributes:
        steps: Steps of the optimiser.
        rows: Windows that a step reads.
        picked: Tokens of a step that count for the loss.
        outputs: Outputs of the jump that a step looks at.
        rows_at_once: Windows that run through the model together; a step of more takes turns.
        logits_rows: Rows of logits that are in memory together.
    """

    steps: int
    rows: int
    picked: int
    outputs: int
    rows_at_once: int
    logits_rows: int

    def checked(self, step: int) -> bool:
        """Whether the held-out text is looked at after so many steps."""
        return step * CHECKS // self.steps > (step - 1) * CHECKS // self.steps


def choose(
    spec: ModelSpec, windows: int, length: int, passes: int, outputs: int, memory: int | None
) -> Sizes:
    """Sizes for a text of so many windows of `length` tokens, read `passes` times.

    Args:
        spec: Of the model.
        windows: To train on.
        length: Tokens of each.
        passes: Over the text.
        outputs: That the jump learns from.
        memory: Bytes of the GPU that the weights leave, or None on the CPU.
    """
    tokens = windows * length * passes
    least, most = STEP_TOKENS
    rows = max(1, min(max(tokens // STEPS, least), most) // length)
    rows = min(rows, windows)
    steps = max(1, tokens // (rows * length))
    device = "cpu" if memory is None else "cuda"
    return Sizes(
        steps,
        rows,
        max(1, rows * length // ONE_IN),
        min(OUTPUTS_AT_ONCE, outputs),
        rows_at_once(spec, length, min(OUTPUTS_AT_ONCE, outputs), memory),
        max(16, LOGITS[device] // spec.vocab_size),
    )


def rows_at_once(spec: ModelSpec, length: int, outputs: int, memory: int | None) -> int:
    """Windows of `length` tokens whose states after every block, and outputs, fit into memory."""
    # Inside a block: some ten vectors of the hidden size, and four of the MLP's; a jump may keep
    # as many in fp32 for each of its outputs.
    block = 12 * spec.hidden_size + 4 * spec.intermediate_size
    values = spec.hidden_size * spec.blocks + (1 + 2 * outputs) * block
    if memory is None:  # not what is free just now: the same command does the same
        return max(1, int(CPU_STATES_BYTES / (4 * values * length)))
    return max(1, int(STATES_SHARE * memory / (2 * values * length)))
