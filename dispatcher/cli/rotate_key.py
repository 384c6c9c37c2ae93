"""`dispatcher rotate-key`: encrypt what is secret in the database under the first key."""

import click

from dispatcher.cli.common import Context, as_json, connected, print_json, print_rows, run_async
from dispatcher.domain.text import amount
from dispatcher.settings import Settings
from dispatcher.store.sealing import KeyUse, Rotated, keys_in_use, rotate_key


@click.command("rotate-key")
@click.option("--check", is_flag=True, help="Change nothing: show under which keys the secrets are.")
@as_json
@click.pass_obj
def rotate_key_command(context: Context, check: bool, json_out: bool) -> None:
    """Encrypt all secrets under the first of DISPATCHER_ENCRYPTION_KEYS; those in plain text too.

    To change the key: put the new one behind the old for every dispatcher and command and restart them, then first; run this; then take the old
    one out. It may be interrupted and repeated, and runs beside dispatchers.

    \b
    dispatcher rotate-key --check
    """
    settings = context.settings()
    if check:
        uses = run_async(_check(settings))
        rows = [{"key": use.key_id, "role": use.role, "secrets": use.texts} for use in uses]
        if json_out:
            print_json(rows)
        else:
            print_rows(rows, ("key", "role", "secrets"), "There are no secrets.")
        return
    rotated = run_async(_rotate(settings, quiet=json_out))
    if json_out:
        print_json({"encrypted": rotated.texts, "failed": rotated.failed})
    else:
        click.echo(f"{amount(rotated.texts, 'secret was', 'secrets were')} put under key {settings.keyring.first_id}")
        for reason in rotated.failed:
            click.echo(f"error: {reason}", err=True)
    if rotated.failed:
        raise SystemExit(1)


async def _check(settings: Settings) -> list[KeyUse]:
    async with connected(settings) as connection:
        return await keys_in_use(connection, settings.keyring)


async def _rotate(settings: Settings, *, quiet: bool) -> Rotated:
    def tell(so_far: Rotated) -> None:
        if not quiet and so_far.total:
            click.echo(f"{so_far.texts:,} of {so_far.total:,}", err=True)

    async with connected(settings) as connection:
        return await rotate_key(connection, settings.keyring, tell)
