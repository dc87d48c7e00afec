"""A request inside the engine: its tokens, and how many of them the attention workers know."""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from flows.serving.lamina.engine.sampling import Choice
from flows.serving.lamina.requests import Finished, Submit, TokenEvent

NO_SLOT = -1


@dataclass(eq=False)
class Sequence:
    """`tokens` is the prompt and what was generated; `computed` of them have keys and values on the workers.

    What is left of the prompt, and what has to be computed again after a loss, is the same thing: pending
    rows. One pending row is a decoding request; the row of the last token gives the next one.
    """

    submit: Submit
    order: int  # of arrival
    tokens: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)  # of each generated token
    slot: int = NO_SLOT
    computed: int = 0
    table_sent: int = 0  # entries of the block table that workers have
    recoveries: int = 0
    replayed: int = 0  # rows that had been computed before, and were lost
    queued_at: float = 0.0  # monotonic: of the arrival here
    started_at: float | None = None  # of its first row
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        self.queued_at = self.queued_at or time.monotonic()
        self.tokens = self.tokens or list(self.submit.prompt)

    @property
    def id(self) -> str:
        return self.submit.id

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.submit.prompt)

    @property
    def longest(self) -> int:
        """Positions that it can ever need: the last token is not attended to by any."""
        return len(self.submit.prompt) + self.submit.max_tokens - 1

    @property
    def running(self) -> bool:
        return self.slot != NO_SLOT

    def append(self, choice: Choice) -> None:
        self.tokens.append(choice.token)
        self.choices.append(choice)
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()

    def lose(self) -> None:
        """Its keys and values are gone: all rows are pending again."""
        self.replayed += self.computed
        self.computed = 0
        self.table_sent = 0

    def event(self, index: int) -> TokenEvent:
        choice = self.choices[index]
        return TokenEvent(
            id=self.id,
            index=index,
            token=choice.token,
            logprob=choice.logprob,
            alternatives=choice.alternatives,
        )

    def expired(self, now: float) -> bool:
        """Whether a deadline has passed at `now`, Unix time."""
        deadlines: Many[float | None] = [self.submit.deadline]
        if self.started_at is None:
            deadlines = [self.submit.deadline, self.submit.queue_deadline]
        return any(deadline is not None and now > deadline for deadline in deadlines)

    def finished(
        self, reason: str, code: str | None = None, message: str | None = None, status: int = 500
    ) -> Finished:
        now = time.monotonic()
        started, first = self.started_at, self.first_token_at
        return Finished(
            id=self.id,
            reason=reason,  # type: ignore[arg-type]  # validated by the message
            code=code,
            message=message,
            status=status,
            prompt_tokens=len(self.submit.prompt),
            completion_tokens=self.generated,
            queue_s=max(0.0, (started or now) - self.queued_at),
            prefill_s=max(0.0, (first or now) - started) if started else 0.0,
            decode_s=max(0.0, now - first) if first else 0.0,
            recoveries=self.recoveries,
        )
