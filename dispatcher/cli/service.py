"""`dispatcher run`, `web`, `migrate` and `demo`."""

import click
import structlog

from dispatcher import log
from dispatcher.cli.common import Context, as_json, connection_to, database, print_json, run_async, say
from dispatcher.domain.sealing import new_encryption_key
from dispatcher.errors import TakenOverError
from dispatcher.main import serve, serve_web
from dispatcher.ports import FencedError
from dispatcher.settings import Settings
from dispatcher.store.migrate import check, schema_sql
from dispatcher.store.migrate import migrate as migrate_schema
from dispatcher.store.sealing import check_keys

_log = structlog.get_logger(room="main")


@click.command()
@click.pass_obj
def run(context: Context) -> None:
    """Run the service: deliver until SIGTERM or Ctrl-C, which lets POSTs in flight end first; a second one forces.

    One process delivers for one database. A second one is a hot standby: it waits, and takes over within 2 s when the owner ends, within 6 s
    when it is frozen or cut off (`dispatcher status` tells who owns). An owner that was taken over stops with exit status 7; started again it
    is the standby. `dispatcher migrate` installs the schema first (an embedded PostgreSQL is installed by itself).

    \b
    DISPATCHER_DATABASE_URL=postgresql://user:password@host/db dispatcher run
    """
    settings = context.settings()
    log.configure(settings)
    try:
        run_async(_run(settings))
    except FencedError as exc:
        raise TakenOverError(
            f"{exc}. This one has stopped, and neither sends nor writes any more; started again it waits as a standby "
            "(`dispatcher status` says who owns)"
        ) from exc


async def _run(settings: Settings) -> None:
    async with database(settings) as dsn:
        async with connection_to(dsn, "check") as connection:
            for warning in [*await check(connection, settings), *await check_keys(connection, settings.keyring)]:
                _log.warning("database.check", warning=warning)
        await serve(settings, dsn)


@click.command()
@click.pass_obj
def web(context: Context) -> None:
    """Serve the panel and the API alone, beside a dispatcher that runs elsewhere, until SIGTERM or Ctrl-C.

    `dispatcher run` serves them too where DISPATCHER_WEB_LISTEN is set. Health and metrics: DISPATCHER_HEALTH_LISTEN, as for `run`.
    The first login: `dispatcher key create`, or `dispatcher key link`.

    \b
    DISPATCHER_WEB_LISTEN=0.0.0.0:8080 DISPATCHER_PUBLIC_URL=https://hooks.example.com dispatcher web
    """
    settings = context.settings()
    log.configure(settings)
    run_async(_web(settings))


async def _web(settings: Settings) -> None:
    async with database(settings) as dsn:
        async with connection_to(dsn, "check") as connection:
            for warning in await check(connection, settings):
                _log.warning("database.check", warning=warning)
        await serve_web(settings, dsn)


@click.command()
@click.option(
    "--sql",
    is_flag=True,
    help="Print the schema's SQL without BEGIN and COMMIT, for a tool that has its own transaction; change nothing.",
)
@as_json
@click.pass_obj
def migrate(context: Context, sql: bool, json_out: bool) -> None:
    """Install the schema, or bring it up to date. Safe to repeat, also after an interruption.

    Producers and an older dispatcher may go on meanwhile; what takes long says how far it is, on stderr.

    Applies DISPATCHER_PAYLOAD_BYTES_MAX and DISPATCHER_DOORBELL to the database too. Needs CREATE on the database, and CREATEROLE for the roles
    webhook_producer and webhook_dispatcher (without it they are left out, with a notice).

    \b
    DISPATCHER_DATABASE_URL=postgresql://owner:password@host/db dispatcher migrate
    """
    if sql:
        click.echo(schema_sql().replace("\nBEGIN;\n", "\n", 1).removesuffix("\nCOMMIT;\n"))
        return
    settings = context.settings()

    async def work() -> None:
        async with database(settings, migrated=False) as dsn, connection_to(dsn, "migrate") as connection:
            migrated = await migrate_schema(connection, settings, tell=lambda text: say(text, err=True))
        if json_out:
            print_json({"version": migrated.version, "done": list(migrated.done)})
        else:
            say("\n".join(migrated.done) or f"up to date: schema version {migrated.version}")

    run_async(work())


@click.command()
@click.option(
    "--seconds", type=click.FloatRange(min=1), help="Produce for so long, then settle. [default: until Ctrl-C]"
)
@click.option(
    "--rate", type=click.FloatRange(min=1, max=20_000), default=200, show_default=True, help="Events a second."
)
@click.option("--plain", is_flag=True, help="Lines instead of the live view.")
@as_json
@click.pass_obj
def demo(context: Context, seconds: float | None, rate: float, plain: bool, json_out: bool) -> None:
    """See it work: an embedded PostgreSQL, an SMS platform that inserts events, and receivers that are fast, slow, flaky, rate-limited and down.

    The first thing it prints is a link to the panel, which logs a browser in, once. Everything is made anew in a temporary directory and removed
    at the end. When time is up, or at Ctrl-C, it lets everything settle and checks from the database that every committed event was delivered or
    is accounted for; that is the exit status.

    \b
    dispatcher demo --seconds 15 --rate 500
    """
    from dispatcher.demo.run import free_port, run_demo  # a start needs none of it

    settings = context.settings(
        database_url=None, database_url_file=None, proxy_url=None, proxy_url_file=None, allowed_networks="127.0.0.0/8", log_level="error",
        web_listen=f"127.0.0.1:{free_port()}", public_url=None, web_base_path=None, web_connect=None, frame_ancestors="",
        encryption_keys=new_encryption_key(), encryption_keys_file=None,
        retry_schedule_s=(1, 2, 3, 5, 8, 13, 21), breaker_wait_s=1.0, breaker_wait_max_s=4.0,
    )  # fmt: skip
    log.configure(settings)
    if not run_async(run_demo(settings, seconds=seconds, rate=rate, plain=plain or json_out, json_out=json_out)):
        raise SystemExit(1)
