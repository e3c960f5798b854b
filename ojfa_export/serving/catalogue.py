"""The bundles of a server: what they are called, whether they are ready, and what runs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ojfa_export import backends
from ojfa_export.decoding.exits import Exit
from ojfa_export.engine.engine import Engine
from ojfa_export.errors import UsageError, VerificationError
from ojfa_export.runtime.model import Model, load
from ojfa_export.serving.burst import Burst
from ojfa_export.serving.errors import HttpError, draining
from ojfa_export.serving.promise_watch import PromiseWatch
from ojfa_export.verify.golden import verify_golden

State = Literal["loading", "ready", "draining"]


@dataclass
class Served:
    """One bundle.

    Attributes:
        name: What clients call it.
        model: Opened.
        engine: Runs it.
        watch: Compares some tokens with the full model; None where nothing is promised or asked.
        created: Seconds since 1970.
        burst: Told of the requests that come.
    """

    name: str
    model: Model
    engine: Engine
    watch: PromiseWatch | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    burst: Burst = field(init=False)

    def __post_init__(self) -> None:
        self.burst = Burst(self.engine)

    def about(self, exit: Exit | str = "full") -> dict[str, Any]:
        """The bundle as `/v1/models` lists it; what is not OpenAI's is in `ojfa`.

        Args:
            exit: Blocks to run where a request doesn't say.
        """
        manifest = self.model.manifest
        promise = manifest.promise
        ours: dict[str, Any] = {
            "blocks": self.model.blocks,
            "family": self.model.spec.family,
            "precision": manifest.precision,
            "exit": exit,
            "exits": list(self.model.exits),
            "auto": manifest.auto is not None,
            "drafts": self.model.drafts is not None,
            "chat": "chat.json" in manifest.files,
            "promise": None,
        }
        if promise is not None:
            ours["promise"] = {
                "max_disagreement": promise.limits.max_disagreement,
                "confidence": promise.limits.confidence,
                "relative_cost": promise.relative_cost,
                "reason": promise.reason,
                "domains": [each.name for each in promise.domains],
            }
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "ojfa-export",
            "root": self.name,
            "parent": None,
            "max_model_len": manifest.cache.max_length,
            "ojfa": ours,
        }


class Catalogue:
    """All bundles of a server.

    Attributes:
        state: "loading" until all are there, "draining" when the server ends.
        served: By name, in the order in which they were given.
    """

    def __init__(self, served: Sequence[Served] = ()) -> None:
        self.served: dict[str, Served] = {}
        self.state: State = "loading"
        for each in served:
            self.add(each)
        if served:
            self.state = "ready"

    def add(self, served: Served) -> None:
        """Takes one more bundle."""
        self.served[served.name] = served

    def find(self, name: str | None) -> Served:
        """The bundle that a request names; without a name the only one.

        Raises:
            HttpError: 404 where there is none of this name, 503 while loading or ending.
        """
        self.must_be_ready()
        if name is None:
            if len(self.served) == 1:
                return next(iter(self.served.values()))
            known = ", ".join(self.served)
            raise HttpError(400, f"model: name one of {known}", param="model", code="missing")
        if name not in self.served:
            message = f"the model {name!r} does not exist; /v1/models lists those that do"
            raise HttpError(404, message, param="model", code="model_not_found")
        return self.served[name]

    def must_be_ready(self) -> None:
        """Refuses while requests can't be taken.

        Raises:
            HttpError: 503.
        """
        if self.state == "draining":
            raise draining()
        if self.state == "loading":
            raise HttpError(
                503, "the server is loading", code="loading", headers={"Retry-After": "1"}
            )

    def close(self) -> None:
        """Ends what runs, and gives memory back."""
        for each in self.served.values():
            each.engine.close()


def names_of(bundles: Sequence[Path]) -> list[str]:
    """What each bundle is called: its directory's name, without `.ojfa`.

    Raises:
        UsageError: Two of them have the same name.
    """
    names = [path.resolve().name.removesuffix(".ojfa") for path in bundles]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"two bundles are called {name!r}", hint="clients name bundles; rename one of them"
            )
    return names


def open_served(
    name: str,
    bundle: Path,
    *,
    backend: str = backends.DEFAULT,
    shadow_share: float = 0.0,
    exit: Exit | str = "full",
    make_engine: Callable[[Model], Engine] = Engine,
) -> Served:
    """Opens a bundle, and replays its golden tokens before anybody may use it.

    Args:
        name: What clients call it.
        bundle: Its directory.
        backend: Engines to run.
        shadow_share: The probability that a token is compared with the full model.
        exit: Blocks to run where a request doesn't say: what is warmed up beside full depth.
        make_engine: Makes what runs it.

    Raises:
        VerificationError: It doesn't give its golden tokens here.
        OjfaError: It can't be opened.
    """
    model = load(bundle, backend=backend)
    model.resolve_exit(exit)  # type: ignore[arg-type]
    model.engines.load_blocks(model.blocks)
    failed = [check.name for check in verify_golden(model) if not check.passed]
    if failed:
        raise VerificationError(
            f"{bundle} doesn't give its golden tokens on this machine: {', '.join(failed)}",
            hint=f"see 'ojfa-export verify {bundle}'; build it again on this machine",
        )
    engine = make_engine(model)
    if backend != backends.DEFAULT:  # a CPU has nothing to warm up
        engine.warm_up(sampled=True, exits=_below_full(model, exit))
    watch = None
    if shadow_share and model.manifest.promise is not None:
        watch = PromiseWatch(engine, model.manifest.promise, shadow_share)
    return Served(name, model, engine, watch)


def _below_full(model: Model, exit: Exit | str) -> tuple[int, ...]:
    """The depths below full at which requests leave by an exit or a policy."""
    decided = model.resolve_exit(exit)  # type: ignore[arg-type]
    depths = (decided,) if isinstance(decided, int) else decided.exits
    return tuple(depth for depth in depths if depth < model.blocks)
