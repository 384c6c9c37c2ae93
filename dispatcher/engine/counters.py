"""What happened, as plain ints: counted where the fact is known, rendered where somebody asks."""

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counters:
    events_read: int = 0
    events_unwanted: int = 0
    head_reads: int = 0
    gap_reads: int = 0
    lag_reads: int = 0
    retry_reads: int = 0
    run_reads: int = 0
    urgent_reads: int = 0
    key_reads: int = 0
    caught_up: int = 0
    crowded_out: int = 0
    memory_waits: int = 0
    sleeps: int = 0
    wake_ups: int = 0
    attempts: int = 0
    delivered: int = 0
    failed: int = 0
    retried: int = 0
    dead: int = 0
    expired: int = 0  # settled unsent, because the event's expires_at had passed
    throttled: int = 0  # answers that asked for less: 429, 502, 503, 504
    stale: int = 0
    rate_waits: int = 0  # turns that a lane gave up for lack of a token, of its rate or its pace
    breaker_opened: int = 0
    batches: int = 0
    rows_recorded: int = 0
    batch_retries: int = 0
    checkpoints: int = 0
    store_away: int = 0
    partitions_made: int = 0
    partitions_expired: int = 0
    partitions_dropped: int = 0
    deliveries_expired: int = 0
    deliveries_expired_held: int = 0  # of these, of endpoints that are paused or disabled
    dead_letters_expired: int = 0
    janitor_failures: int = 0
    starts: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)
