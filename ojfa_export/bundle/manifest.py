"""The manifest: everything that a bundle says of itself. The format is a contract; unknown fields
are refused, and a change of meaning raises FORMAT_VERSION.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from ojfa_export.bundle.check_entry import CheckEntry
from ojfa_export.bundle.entries import EngineSet, FileEntry, GraphEntry, RotaryTables, TensorSlice
from ojfa_export.bundle.names import MANIFEST, graph_names
from ojfa_export.bundle.part import NonNegativeInt, Part, PositiveInt, Sha256
from ojfa_export.bundle.promise import Promise, Share
from ojfa_export.bundle.shortcut_entry import ShortcutEntry
from ojfa_export.bundle.weight_format import WeightFormat, quantised_features
from ojfa_export.decoding.default import Default
from ojfa_export.decoding.exits import resolve_exit
from ojfa_export.decoding.generation_defaults import NO_DEFAULTS, GenerationDefaults
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.errors import BundleError, UsageError
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec
from ojfa_export.system.files import read_regular

FORMAT = "ojfa-bundle"
FORMAT_VERSION = 1
DIGEST = "digest"
# What a manifest may hold, as the C++ runtime has it: nothing is allocated or counted beyond.
MANIFEST_BYTES = 64 << 20
BLOCKS = 1 << 16
LARGEST = 2**31 - 1


class Model(Part):
    """The model that was compiled.

    Attributes:
        name: What the user called it: directory name or hub id.
        revision: Of a hub id.
        sha256: Digest of config and weight files.
        config: The checkpoint's config.json.
        ignored_fields: Fields of it, or of generation_config.json, that were not understood or not
            followed, and ignored as the user said.
        spec: What was read from it.
    """

    name: str
    revision: str | None
    sha256: str = Sha256
    config: dict[str, Any]
    ignored_fields: tuple[str, ...] = ()
    spec: ModelSpec


class CacheLayout(Part):
    """The key-value cache that the engines expect."""

    axes: tuple[str, ...] = ("batch", "kv_head", "position", "head_feature")
    max_length: int = Field(ge=1, le=LARGEST)
    max_batch_size: int = Field(ge=1, le=LARGEST)


class DraftEntry(Part):
    """A layer that drafts; what it computes: `bundle.draft_shortcut`.

    Attributes:
        depths: Blocks run before each of the model's states that it sees.
        spec: The layer, as a model of one block.
        rope_theta: Base of its rotations' frequencies.
        parameters: Of all of it; a head of the model's own is none of them.
        rotary: Rows of these are the layer's `rotary_cos` and `rotary_sin`.
        tokens: Of a layer with a head of its own: ids [D] int32 that its logits are of, rising.
        graphs: Those of `names.DRAFT_GRAPHS`.
        engines: Of the backends that run draft layers.
        acceptance: Shares of rounds of the build whose first 1, 2, ... drafts were all taken,
            greedily going on from held-out text; none where its backend runs no draft layers.
    """

    depths: tuple[PositiveInt, ...] = Field(min_length=1)
    spec: ModelSpec
    rope_theta: PositiveFloat
    parameters: PositiveInt
    rotary: RotaryTables
    tokens: TensorSlice | None
    graphs: tuple[GraphEntry, ...]
    engines: tuple[EngineSet, ...] = ()
    acceptance: tuple[Share, ...] = ()

    def check_fits(self, model: ModelSpec, max_length: int) -> None:
        """Refuses a layer of another model.

        Raises:
            ValueError: What doesn't fit.
        """
        check_spec(self.spec)
        rising = all(a < b for a, b in pairwise(self.depths))
        if not rising or self.depths[-1] > model.blocks:
            raise ValueError("draft.depths: they must rise, to the model's blocks at most")
        if self.spec.blocks != 1 or self.spec.hidden_size != model.hidden_size:
            raise ValueError("draft.spec: it must be one block of the model's hidden size")
        count = model.vocab_size if self.tokens is None else self.spec.vocab_size
        if self.spec.vocab_size != count or count > model.vocab_size:
            raise ValueError("draft.spec.vocab_size: it must be within the model's")
        if self.tokens is not None and self.tokens.shape != (count,):
            raise ValueError("draft.tokens: there must be one for each logit")
        half = self.spec.rotary_dim // 2
        for shape in (self.rotary.cos.shape, self.rotary.sin.shape):
            if not half or len(shape) != 2 or shape[0] < max_length or shape[1] != half:
                raise ValueError(f"draft.rotary: they must be [{max_length} or more, {half}]")


class CalibrationSource(Part):
    """A text that the shortcut was fitted on."""

    name: str
    sha256: str = Sha256
    bytes: NonNegativeInt


class Calibration(Part):
    """What the shortcut was fitted and measured on."""

    sources: tuple[CalibrationSource, ...]
    tokens_fit: NonNegativeInt
    tokens_held_out: PositiveInt


class Golden(Part):
    """Greedy tokens that these engines must reproduce on any machine.

    Attributes:
        exit: Blocks run for each token.
    """

    exit: PositiveInt
    prompt_token_ids: tuple[NonNegativeInt, ...] = Field(min_length=1)
    token_ids: tuple[NonNegativeInt, ...] = Field(min_length=1)


class Built(Part):
    """Provenance.

    `time` and `host` differ between two equal builds, and so does what depends on how fast the
    machine is: `Manifest.default` and, where a promise was asked, `auto` and `promise`. With them
    the manifest's own digest. Nothing else does.
    """

    time: datetime
    host: str
    versions: dict[str, str]


class Manifest(Part):
    """See the module. manifest.json holds these fields and `digest`: see `manifest_digest`.

    Attributes:
        auto: When tokens leave early under `--exit auto`; None where the build chose nothing.
        promise: What `auto` was shown to keep; None where nothing was asked.
        default: What happens where a user names no way of decoding; None is full depth.
        draft: The layer that drafts, if there is one; the field is left out where there is none.
        weights: What blocks' matrices and heads are stored as, where they are quantised; the field
            is left out where they are as `precision` says.
        check: The head that exit policies ask; they ask the exit head where there is none, and the
            field is left out.
        generation: How the checkpoint says that text is generated.
    """

    format: Literal["ojfa-bundle"] = "ojfa-bundle"
    format_version: Literal[1] = 1
    model: Model
    precision: Precision
    opset: PositiveInt
    cache: CacheLayout
    rotary: RotaryTables | None
    graphs: tuple[GraphEntry, ...]
    engines: tuple[EngineSet, ...]
    shortcut: ShortcutEntry
    calibration: Calibration
    golden: tuple[Golden, ...] = Field(min_length=1)
    auto: ExitPolicy | None = None
    promise: Promise | None = None
    default: Default | None = None
    generation: GenerationDefaults = NO_DEFAULTS
    draft: DraftEntry | None = None
    weights: WeightFormat | None = None
    check: CheckEntry | None = None
    files: dict[str, FileEntry]
    built: Built

    @property
    def all_graphs(self) -> tuple[GraphEntry, ...]:
        """The model's, the draft layer's and the check head's."""
        others = (each.graphs for each in (self.draft, self.check) if each is not None)
        return sum(others, self.graphs)

    @property
    def all_engines(self) -> tuple[EngineSet, ...]:
        """The model's, the draft layer's and the check head's."""
        others = (each.engines for each in (self.draft, self.check) if each is not None)
        return sum(others, self.engines)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Manifest:
        check_spec(self.model.spec)
        spec = self.model.spec
        if spec.learned_positions and self.cache.max_length > spec.max_positions:
            raise ValueError("the cache is longer than the model has positions")
        blocks, vocabulary = spec.blocks, spec.vocab_size
        for golden in self.golden:
            ids = (*golden.prompt_token_ids, *golden.token_ids)
            if (
                golden.exit > blocks
                or max(ids) >= vocabulary
                or len(ids) > self.cache.max_length + 1
            ):
                raise ValueError("golden tokens are outside the model")
        if max(self.generation.suppress_tokens, default=0) >= vocabulary:
            raise ValueError("the tokens that are never chosen are outside the model")
        gates = self.shortcut.gates
        if gates is not None and (not self.shortcut.residual or len(gates) != blocks - 1):
            raise ValueError("the shortcut's gates must be one for each exit")
        return self

    @property
    def graph_names(self) -> list[str]:
        """The model's graphs, its shortcut's among them, in the order of the computation."""
        return graph_names(self.model.spec.blocks, self.shortcut.blocks or 0)

    @model_validator(mode="after")
    def _exits_fit(self) -> Manifest:
        blocks, served = self.model.spec.blocks, self.shortcut.exits
        if served is not None and served[-1] >= blocks:
            raise ValueError(f"the shortcut's exits: {served[-1]} is none of {blocks} blocks")
        for golden in self.golden:
            resolve_exit(golden.exit, blocks, served)
        if self.auto is not None:
            self.auto.check_fits(blocks, served)
        if self.default is not None:
            if self.default.exit == "auto" and self.auto is None:
                raise ValueError("the default is auto, which the bundle doesn't have")
            if self.default.speculation is not None:
                self.default.speculation.resolve_exit(
                    blocks, has_layer=self.draft is not None, served=served
                )
        if self.draft is not None:
            self.draft.check_fits(self.model.spec, self.cache.max_length)
        if self.check is not None:
            self.check.check_fits(self.model.spec, self.cache.max_length, served)
        return self

    @model_validator(mode="after")
    def _weights_fit(self) -> Manifest:
        if self.weights is None:
            return self
        if not self.weights.quantised or self.draft is not None:
            raise ValueError("weights: they must be quantised, without a draft layer")
        if self.weights.wide:  # shapes of what is left are compared with the graphs
            return self
        for features in quantised_features(self.model.spec):
            if features % self.weights.group_size:
                raise ValueError(f"weights: {features} features are no whole groups")
        return self

    @model_validator(mode="after")
    def _rotary_fits(self) -> Manifest:
        spec, tables = self.model.spec, self.rotary
        if (tables is None) != (spec.rotary_dim == 0):
            raise ValueError("rotary tables must be there exactly where the model rotates")
        if tables is not None:
            rows = self.cache.max_length * spec.rotary_sets
            for shape in (tables.cos.shape, tables.sin.shape):
                if len(shape) != 2 or shape[0] < rows or shape[1] != spec.rotary_dim // 2:
                    raise ValueError(
                        f"rotary tables {list(shape)} must be [{rows} or more, "
                        f"{spec.rotary_dim // 2}]"
                    )
        return self

    def to_json(self) -> str:
        """The text of manifest.json."""
        fields = self.model_dump(mode="json")
        for later in ("check", "draft", "weights"):
            if fields[later] is None:
                del fields[later]  # what reads bundles of an earlier form knows no such field
        for later in ("offsets", "wide"):
            if "weights" in fields and not fields["weights"][later]:
                del fields["weights"][later]
        fields[DIGEST] = manifest_digest(fields)
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def manifest_digest(fields: Mapping[str, Any]) -> str:
    """The manifest's own digest, which protects what no file's digest does.

    Args:
        fields: The JSON object in manifest.json; its field `digest` is left out.

    Returns:
        Hex SHA-256 of the object as JSON with sorted keys, no white space and ASCII only.
    """
    rest = {name: value for name, value in fields.items() if name != DIGEST}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Reads and checks a bundle's manifest.

    Raises:
        BundleError: None there, damaged, or of another version.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise BundleError(
            f"{directory} is not a bundle: no such directory",
            hint="make one with 'ojfa-export build CHECKPOINT -o BUNDLE'",
        )
    try:
        raw = parse_json(read_regular(path, MANIFEST_BYTES))
    except FileNotFoundError:
        raise BundleError(
            f"{directory} is not a bundle: it has no {MANIFEST}",
            hint="make one with 'ojfa-export build CHECKPOINT -o BUNDLE'",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise _damaged(path, f"it does not say format '{FORMAT}'")
    version = raw.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {version}; this ojfa-export reads {FORMAT_VERSION}",
            hint="upgrade ojfa-export, or build the bundle again with this version",
        )
    if raw.pop(DIGEST, None) != manifest_digest(raw):
        raise BundleError(
            f"{path} was altered: its own digest differs",
            hint="copy the bundle again whole, or build it again",
        )
    try:
        return Manifest.model_validate_json(json.dumps(raw))
    except (ValidationError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        detail = str(error)
        if first:
            place, message = ".".join(map(str, first["loc"])), first["msg"]
            detail = f"{place}: {message}" if place else message.removeprefix("Value error, ")
        raise _damaged(path, detail) from error
    except UsageError as error:
        raise _damaged(path, error.message) from error


def check_spec(spec: ModelSpec) -> None:
    """Refuses what no model can be, before anything is made by it.

    Raises:
        ValueError: It is beyond what is read, or contradicts itself.
    """
    if spec.blocks > BLOCKS:
        raise ValueError(f"model.spec.blocks: {spec.blocks} is above {BLOCKS}")
    for name, value in spec:
        values = value if isinstance(value, tuple) else (value,)
        if any(isinstance(each, int) and abs(each) > LARGEST for each in values):
            raise ValueError(f"model.spec.{name}: above {LARGEST}")
    if len(spec.attention_scales) != spec.blocks:
        raise ValueError("model.spec.attention_scales: there must be one for each block")
    if spec.heads % spec.kv_heads:
        raise ValueError("model.spec.kv_heads: they must divide the heads")
    if spec.rotary_dim % 2 or not 0 <= spec.rotary_dim <= spec.head_dim:
        raise ValueError("model.spec.rotary_dim: it must be even and at most head_dim")
    _check_parts(spec)


def _check_parts(spec: ModelSpec) -> None:
    if spec.parallel and spec.norms != "before":
        raise ValueError("model.spec.parallel: the norms must be before")
    if spec.rotated_second and (spec.learned_positions or spec.rotary_switch is not None):
        raise ValueError("model.spec.rotated_second: there must be rotations, and one set without")
    for name in ("rotated", "windowed", "rotated_second"):
        if len(getattr(spec, name)) not in (0, spec.blocks):
            raise ValueError(f"model.spec.{name}: there must be one for each block, or none")


def parse_json(text: bytes) -> Any:
    """JSON as the standard has it: Python's own reader also takes NaN and numbers without end.

    Raises:
        ValueError: It is none.
    """

    def number(literal: str) -> float:
        value = float(literal)
        if not math.isfinite(value):
            raise ValueError(f"{literal} is no number that can be held")
        return value

    return json.loads(text.decode(), parse_constant=number, parse_float=number)


def _damaged(path: Path, detail: str) -> BundleError:
    return BundleError(
        f"{path} is damaged: {detail}", hint="build the bundle again, or copy it again whole"
    )
