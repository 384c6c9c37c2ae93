"""Plans of what live pages ask again and again: by an index, and no more of it than they show, whatever is in the log."""

import pytest

from dispatcher.store.admin import ADMIN
from dispatcher.store.overview import OVERVIEW
from dispatcher.store.stats import STATS
from tests.conftest import connected

ASKED = {  # parameter types, arguments, what bounds the descent
    "tail": (
        ADMIN.tail, "timestamptz, bigint[], bigint, interval, integer, boolean", "NULL, '{7,8}', 2000, '15 s', 500, false", "(event_id > '2000'",
    ),
    "first_posts": (OVERVIEW.first_posts, "bigint, integer", "1000, 500", "(event_id > "),
    "lately": (STATS.lately, "integer", "5", "(minute >= "),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
async def test_it_descends_to_its_bound(dsn: str, name: str):
    statement, types, arguments, bound = ASKED[name]
    async with connected(dsn) as db:
        await db.execute("SET plan_cache_mode = force_custom_plan; SET enable_seqscan = off")
        await db.execute(f"PREPARE asked ({types}) AS {statement}")
        plan = "\n".join(row[0] for row in await db.fetch(f"EXPLAIN EXECUTE asked ({arguments})"))
    assert "Seq Scan" not in plan, plan
    assert f"Index Cond: ({bound}" in plan or f"Index Cond: {bound}" in plan, plan
