"""Watches what a model generates: what it did, and how often early tokens differ."""

from __future__ import annotations

import threading

import numpy as np

from ojfa_export.decoding.events import Listener
from ojfa_export.runtime.disagreement import DisagreementMonitor
from ojfa_export.runtime.session import Session
from ojfa_export.runtime.shadow import Shadow
from ojfa_export.runtime.stats import Stats
from ojfa_export.system.arguments import instance, text, whole_number, wrong


class Monitor:
    """One for many requests, of any number of threads; see `Model.monitor`.

    Args:
        share: The probability that a token is chosen for a shadow check, above 0 and at most 1.
        disagreement: The test of a promise and its estimates; None only counts.
        on_event: Called with each event of the sessions; see `Session.on_event`.
        seed: Of the choice of tokens; None for another one every time.

    Raises:
        UsageError: A share out of range, or an argument of another type.

    Attributes:
        disagreement: As given.
        stats: Of all finished sessions together.
    """

    def __init__(
        self,
        share: float,
        disagreement: DisagreementMonitor | None = None,
        *,
        on_event: Listener | None = None,
        seed: int | None = None,
    ) -> None:
        if disagreement is not None:
            instance("a disagreement monitor", disagreement, DisagreementMonitor)
        if on_event is not None and not callable(on_event):
            raise wrong("on_event", "a function of an event", on_event)
        self.disagreement = disagreement
        self.stats = Stats()
        self._share = share
        self._on_event = on_event
        if seed is not None:
            seed = whole_number("the seed of a monitor", seed, 0)
        self._seeds = np.random.SeedSequence(seed)
        self._lock = threading.Lock()
        self.shadow()  # a share out of range is an error now

    def shadow(self) -> Shadow:
        """The choice of tokens for one more session."""
        with self._lock:
            [seed] = self._seeds.spawn(1)
        return Shadow(self._share, np.random.default_rng(seed))

    def watch(self, session: Session) -> None:
        """Listens to a session that has a `shadow`."""
        instance("a session", session, Session).on_event = self._on_event

    def check_domain(self, domain: str | None) -> None:
        """Checks that requests of a domain can be taken.

        Raises:
            UsageError: The promise has no such domain.
        """
        if domain is not None:
            text("a domain", domain)
        if self.disagreement is not None:
            self.disagreement.state(domain)

    def finish(self, session: Session, domain: str | None = None) -> None:
        """Runs the shadow checks that are left, and takes each sequence as one request.

        A sequence of which no token was chosen says nothing and isn't taken. The session's counts
        begin anew, and what its sequences do from here on is another request.

        Args:
            session: With a `shadow`; its sequences have ended.
            domain: Of the requests; None where it isn't known.

        Raises:
            UsageError: An unknown domain, or a session without a `shadow`.
        """
        instance("a session", session, Session)
        self.check_domain(domain)
        session.run_shadow_checks()
        losses = []
        if session.shadow is not None:
            for row in range(session.batch_size):
                losses.append(session.shadow.loss(row))
                session.shadow.forget(row, 0)
        with self._lock:
            self.stats.add(session.stats)
            session.stats = Stats()
            if self.disagreement is not None:
                self.disagreement.update([x for x in losses if x is not None], domain)
