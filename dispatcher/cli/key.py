"""`dispatcher key …`: who may use panel and API."""

from dataclasses import asdict

import click

from dispatcher.cli.common import DURATION, ID, Context, as_json, print_json, print_rows, with_connection
from dispatcher.domain.principal import OPERATOR
from dispatcher.settings import Settings
from dispatcher.store import access
from dispatcher.web.app import LISTEN


@click.group()
def key() -> None:
    """Make, list and revoke keys for panel and API: an operator's, which may do everything, or an account's.

    \b
    dispatcher key create --name deploy
    curl -H 'Authorization: Bearer whkey_…' http://127.0.0.1:8080/api/v1/endpoints
    """


@key.command()
@click.option("--account", "account_id", help="For this account only. [default: an operator's]")
@click.option("--name", default="", help="A name for people.")
@click.option("--ttl", "ttl_s", type=DURATION, help="It ends by itself after so long: 90d. [default: never]")
@as_json
@click.pass_obj
def create(context: Context, account_id: str | None, name: str, ttl_s: float | None, json_out: bool) -> None:
    """Make a key. It is shown now and never again: the database has its hash only.

    \b
    dispatcher key create --account acct_1 --name 'their backend' --ttl 90d
    """
    made, text = with_connection(
        context.settings(),
        lambda db: access.create_key(db, OPERATOR, account_id=account_id, name=name, ttl_s=ttl_s),
    )
    if json_out:
        print_json(asdict(made) | {"key": text})
        return
    click.echo(text)
    click.echo(f"key {made.id}, {_whose(made.account_id)}. It is not shown again.", err=True)


@key.command("list")
@click.option("--account", "account_id", help="Of this account only.")
@click.option("--all", "revoked", is_flag=True, help="Revoked ones too.")
@click.option("--after", type=ID, default=0, help="Begin after this key (to page).")
@as_json
@click.pass_obj
def list_keys(context: Context, account_id: str | None, revoked: bool, after: int, json_out: bool) -> None:
    """List keys, with their first characters and when they were last used.

    \b
    dispatcher key list --account acct_1
    """
    found = with_connection(
        context.settings(),
        lambda db: access.keys(db, OPERATOR, account_id=account_id, revoked=revoked, after=after, limit=1_000),
    )
    rows = [asdict(one) for one in found]
    if json_out:
        print_json(rows)
        return
    columns = ("id", "account_id", "prefix", "name", "created_by", "last_used_at", "expires_at", "revoked_at")
    print_rows(rows, columns, "There are no keys. `dispatcher key create` makes one.")
    if len(rows) == 1_000:
        click.echo(f"… more: --after {rows[-1]['id']}")


@key.command()
@click.argument("key_id", type=ID)
@as_json
@click.pass_obj
def revoke(context: Context, key_id: int, json_out: bool) -> None:
    """End a key, and the logins by it, at once and for good.

    \b
    dispatcher key revoke 3
    """
    ended = with_connection(context.settings(), lambda db: access.revoke_key(db, OPERATOR, key_id))
    if json_out:
        print_json(asdict(ended))
    else:
        click.echo(f"key {ended.id} ({ended.prefix}…), {_whose(ended.account_id)}, is revoked")


@key.command()
@click.option("--account", "account_id", help="Logs in as this account. [default: as an operator]")
@as_json
@click.pass_obj
def link(context: Context, account_id: str | None, json_out: bool) -> None:
    """Make a link that logs a browser in, once, for the next minutes (DISPATCHER_PORTAL_LINK_S).

    \b
    dispatcher key link
    """
    settings = context.settings()
    session_s = settings.session_s if account_id is None else settings.portal_session_s
    made, token = with_connection(
        settings,
        lambda db: access.create_link(
            db, OPERATOR, account_id=account_id, ttl_s=settings.portal_link_s, session_s=session_s
        ),
    )
    address = f"{_public(settings)}/enter/{token}"
    if json_out:
        print_json(asdict(made) | {"url": address})
    else:
        click.echo(address)


def _public(settings: Settings) -> str:
    return settings.public_url or f"http://{settings.web_listen or LISTEN}"


def _whose(account_id: str | None) -> str:
    return "an operator's" if account_id is None else f"of account {account_id}"
