"""What a seed draws before it begins: which kinds of faults there are (swarm: each seed leaves some out), how often, and how small every bound
is. Small bounds are met by every seed; the product's own would take hours of events.
"""

import random
from dataclasses import dataclass
from typing import Any

from dispatcher.settings import Settings

KINDS = (
    # the server
    "crash", "failover", "restart", "outage", "sever", "unknown", "slow", "lost rings", "wall clock",
    # those who write to it
    "rollback", "asynchronous", "prepared", "long transactions", "late trigger", "bursts",
    "pause", "delete", "change", "subscriptions", "runs",
    # the dispatcher
    "kill", "stop", "freeze", "ambush", "standby",
    # receivers
    "failing", "hanging", "resetting", "throttling", "gone", "stale", "unreachable", "slow answers",
    # the log
    "retention",
)  # fmt: skip
OPTIONS = ("ordering", "expiry", "priority")  # what producers and endpoints ask for
LATER = ("unknown commits", "expiring secrets", "skip", "erasure", "filters")
LATER_FROM = 1_000  # seeds below draw none of these: they are known by what they show
RARE = {"retention": 0.25, "standby": 0.35, "wall clock": 0.3, "gone": 0.25, "bursts": 0.4}


@dataclass(frozen=True)
class Plan:
    seed: int
    kinds: frozenset[str]
    duration_s: float
    event_every_s: float
    disaster_every_s: float
    ambush: float
    settings: Settings
    bounds: dict[str, Any]

    def has(self, kind: str) -> bool:
        return kind in self.kinds

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.duration_s:.0f} s with " + ", ".join(
            k for k in (*KINDS, *OPTIONS, *LATER) if k in self.kinds
        )


def draw(seed: int) -> Plan:
    rng = random.Random(f"plan {seed}")
    mildness = rng.choice((0.25, 0.5, 0.5, 0.75))
    kinds = frozenset(kind for kind in KINDS if rng.random() < min(mildness, RARE.get(kind, 1.0)))
    more = random.Random(f"options {seed}")
    slices = random.Random(f"slices {seed}")
    kinds |= {kind for kind in OPTIONS if more.random() < 0.5}
    kinds |= {kind for kind in LATER if seed >= LATER_FROM and random.Random(f"{kind} {seed}").random() < 0.3}
    tiny = rng.random() < 0.75
    settings = Settings.model_construct(
        # Not validated: the bounds are smaller than people may set them.
        queue_events_max=rng.choice((2, 4, 8, 50)) if tiny else 1_000,
        memory_events_max=rng.choice((8, 20, 60)) if tiny else 20_000,
        memory_bytes_max=1 << 20,
        slots=rng.choice((2, 4, 8, 40)),
        in_flight_max=rng.choice((1, 3, 10)),
        retry_schedule_s=rng.choice(((1,), (1, 2, 3), (1, 1, 1, 2, 2))),
        retry_age_max_s=rng.choice((20, 600)),
        breaker_failures=rng.choice((2, 4, 7)),
        breaker_wait_s=rng.choice((0.3, 1.0, 2.0)),
        breaker_wait_max_s=4.0,
        disable_after_s=rng.choice((6, 600)),
        record_rows_max=rng.choice((2, 5, 5_000)) if tiny else 5_000,
        record_wait_ms=rng.choice((0, 10, 50)),
        unrecorded_max=rng.choice((4, 20)) if tiny else 20_000,
        grace_s=rng.choice((0.0, 0.5, 3.0)),
        doorbell=rng.choice(("on", "on", "on", "off")),
        poll_ms=rng.choice((20, 60)),
        retention_days=rng.choice((4, 10)) / 86_400,
        user_agent="simulation",
    )
    bounds: dict[str, Any] = {"janitor.TURN_S": 2.0}
    if tiny:
        bounds |= {
            "reader.HEAD_ROWS": rng.choice((3, 8, 40)),
            "reader.HEAD_OFFERS": rng.choice((1, 4, 5_000)),
            "sender.TURNS_AT_ONCE": rng.choice((1, 3, 200)),
            "catchup.PAGE_ROWS": (page := rng.choice((2, 5, 20))),
            "reader.PAGE_ROWS": page,
            "catchup.READ_BYTES_MAX": (cut := rng.choice((60, 200, 1 << 20))),
            "reader.READ_BYTES_MAX": cut,
            "catchup.SCAN_IDS_MAX": rng.choice((7, 50, 100_000)),
            "gaps.YOUNG_MAX": rng.choice((2, 6, 100)),
            "gaps.YOUNG_RUN_MAX": rng.choice((2, 5)),
            "gaps.OLD_MAX": rng.choice((2, 5, 50)),
            "gaps.LOOK_RANGES_MAX": rng.choice((2, 10)),
            "gaps.LOOK_IDS_MAX": rng.choice((3, 20, 20_000)),
            "lane.HOLES_MAX": rng.choice((2, 5, 50)),
            "lane.RETRIES_MAX": rng.choice((2, 6, 50)),
            "recorder.CHECKPOINT_GAPS_MAX": rng.choice((1, 2)),
            "recorder.UNSETTLED_MAX_S": rng.choice((0.5, 2.0)),
            "recorder.STATS_MAX": rng.choice((1, 100)),
            "recorder.CHECKPOINT_TURN": slices.choice((1, 2, 300)),
            "recorder.CHECKPOINT_PAUSE_S": slices.choice((0, 0.005, 0.05)),
            "keys.KEYS_MAX": more.choice((2, 4, 50)),
            "keys.HELD_BACK_MAX": more.choice((1, 2, 50)),
            "catchup.KEY_ROWS": more.choice((1, 2, 5)),
            "lane.KEYS_PAGE": more.choice((1, 3, 100)),
            "lane.URGENT_MAX": more.choice((1, 4, 100)),
            "gaps.SUMMARY_IDS": more.choice((2, 10, 4_000)),
            "reader.CROWD": more.choice((0, 2, 64)),
            "sender.POSTS_AT_ONCE": more.choice((1, 4, 16)),
            "sender.CONNECTS_AT_ONCE": more.choice((1, 4)),
            "catchup.PAGE_OFFERS": more.choice((1, 8, 2_000)),
            "lane.AHEAD_MIN": more.choice((1, 5, 50)),
        }
    return Plan(
        seed=seed,
        kinds=kinds,
        duration_s=rng.choice((6.0, 12.0, 20.0)),
        event_every_s=rng.choice((0.05, 0.15, 0.4)),
        disaster_every_s=rng.choice((0.4, 1.0, 2.5)),
        ambush=rng.choice((0.0003, 0.001, 0.003)) if "ambush" in kinds else 0.0,
        settings=settings,
        bounds=bounds,
    )
