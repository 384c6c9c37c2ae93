"""`dispatcher doctor`: what is wrong with this installation, and what to do about it."""

import click

from dispatcher.cli.common import Context, as_json, connection_to, database, print_json, run_async, say
from dispatcher.errors import DatabaseAwayError, DispatcherError
from dispatcher.main import DESCRIPTORS_SPARE, descriptors
from dispatcher.settings import Settings
from dispatcher.store.doctor import Finding, Grade, examine
from dispatcher.store.session import is_away

MARKS = {Grade.GOOD: "ok", Grade.WARNING: "warn", Grade.BAD: "BAD"}


@click.command()
@click.option("--strict", is_flag=True, help="Exit status 1 for warnings too.")
@as_json
@click.pass_obj
def doctor(context: Context, strict: bool, json_out: bool) -> None:
    """Look at everything that could keep deliveries from being made, and say what to do about it.

    The schema, privileges and the sequence; the owner; clock, connections and NOTIFY; long and prepared transactions, gaps, partitions; what is
    late and why; retention; this machine's descriptors. It changes nothing. Exit status 0, or 1 if something is bad.

    \b
      dispatcher doctor
      dispatcher doctor --json | jq '.findings[] | select(.grade != "good")'
    """
    settings = context.settings()
    findings = [*run_async(_examine(settings)), _descriptors(settings)]
    worst = max((finding.grade for finding in findings), key=list(Grade).index)
    if json_out:
        print_json({"grade": worst.value, "findings": [finding.as_dict() for finding in findings]})
    else:
        for finding in findings:
            say(f"{MARKS[finding.grade]:<5}{finding.check:<23}{finding.found}")
            if finding.remedy is not None:
                say(f"{'':<28}→ {finding.remedy}")
    if worst is Grade.BAD or (strict and worst is Grade.WARNING):
        raise SystemExit(1)


async def _examine(settings: Settings) -> list[Finding]:
    try:
        async with database(settings) as dsn, connection_to(dsn, "doctor") as connection:
            return await examine(connection, settings)
    except DispatcherError as exc:
        return [Finding("database", Grade.BAD, str(exc), "nothing else can be looked at before that")]
    except Exception as exc:
        if not is_away(exc):
            raise
        raise DatabaseAwayError(
            f"the database went away in the middle ({exc or type(exc).__name__}); run it again"
        ) from exc


def _descriptors(settings: Settings) -> Finding:
    """Of this machine and login: the service may have others."""
    allowed, needed = descriptors(settings)
    if allowed < needed:
        return Finding(
            "descriptors",
            Grade.WARNING,
            f"{allowed:,} may be opened here, {needed:,} are needed for DISPATCHER_SOCKETS_MAX: fewer sockets would be used",
            "raise it (LimitNOFILE= in the unit, ulimit -Hn, the container's nofile) or lower DISPATCHER_SOCKETS_MAX",
        )
    return Finding(
        "descriptors",
        Grade.GOOD,
        f"{allowed:,} may be opened here, {needed:,} are needed ({DESCRIPTORS_SPARE} besides sockets)",
    )
