"""`dispatcher endpoint …`: create, test, go live; then look after it."""

from typing import Any

import click

from dispatcher.cli.common import Context, admin, as_json, print_json, print_rows, run_async, with_admin
from dispatcher.demo.events import sample
from dispatcher.domain.url import parse_url
from dispatcher.engine.trial import TEST_TYPE, Trial, try_endpoint
from dispatcher.errors import InputError
from dispatcher.main import make_transport
from dispatcher.settings import Settings
from dispatcher.store.admin import EndpointView


@click.group()
def endpoint() -> None:
    """Create endpoints, test them, put them live, and look after them.

    An endpoint begins as a draft and gets nothing. `test` sends it one real, signed POST; a passed test belongs to that exact configuration and
    lets it `go-live`. An edit of a live endpoint waits beside it until its own test has passed.
    """


def _config_options(command: Any) -> Any:
    for option in reversed(
        (
            click.option("--name", help="A name for people."),
            click.option(
                "--type",
                "event_types",
                multiple=True,
                help="Event type: exact, prefix (message.*) or *. Repeat it. [default: *]",
            ),
            click.option("--timeout-ms", type=int, help="Bound on one POST. [default: 10000]"),
            click.option("--rate", "rate_per_s", type=float, help="POSTs a second at most. [default: unlimited]"),
            click.option(
                "--burst",
                "rate_burst",
                type=int,
                help="POSTs at once after a quiet time. [default: one second's worth]",
            ),
            click.option(
                "--in-flight",
                "in_flight_max",
                type=int,
                help="POSTs in flight at most. [default: DISPATCHER_IN_FLIGHT_MAX]",
            ),
            click.option(
                "--retry-schedule",
                help="Waits between attempts in seconds: 5,30,120. [default: DISPATCHER_RETRY_SCHEDULE_S]",
            ),
        )
    ):
        command = option(command)
    return command


def _config(given: dict[str, Any]) -> dict[str, Any]:
    """Turn options that were given into configuration."""
    config = {key: value for key, value in given.items() if value not in (None, ())}
    if "event_types" in config:
        config["event_types"] = list(config["event_types"])
    if "retry_schedule" in config:
        text = config.pop("retry_schedule")
        try:
            config["retry_schedule_s"] = [int(part) for part in text.split(",")]
        except ValueError as exc:
            raise InputError(f"--retry-schedule {text!r} is not a list of seconds such as 5,30,120") from exc
    return config


@endpoint.command()
@click.argument("account_id")
@click.argument("url")
@_config_options
@click.option("--secret", help="Signing secret (whsec_…). [default: a new one]")
@click.option("--live", is_flag=True, help="Live at once, without a test: for operators and scripts.")
@as_json
@click.pass_obj
def create(
    context: Context, /, account_id: str, url: str, secret: str | None, live: bool, json_out: bool, **given: Any
) -> None:
    """Create an endpoint of ACCOUNT_ID that receives at URL, as a draft.

    \b
    dispatcher endpoint create acct_1 https://example.com/hooks --type 'message.*'
    """
    settings = context.settings()
    view = with_admin(settings, lambda a: a.create(account_id, _config(given) | {"url": url}, secret=secret, live=live))
    if json_out:
        print_json(view.as_dict() | {"secret": view.secrets[0]})
        return
    click.echo(f"endpoint {view.id} ({view.state})")
    click.echo(f"secret   {view.secrets[0]}")
    if live:
        click.echo("It gets events from now on.")
    else:
        click.echo("It gets nothing yet. Next:")
        click.echo(f"  dispatcher endpoint test {view.id}")
        click.echo(f"  dispatcher endpoint go-live {view.id}")


@endpoint.command()
@click.argument("endpoint_id", type=int)
@click.option("--type", "event_type", default=TEST_TYPE, show_default=True, help="Send the sample of this event type.")
@as_json
@click.pass_obj
def test(context: Context, endpoint_id: int, event_type: str, json_out: bool) -> None:
    """Send one real, signed POST, marked as a test, and say what came of it.

    Exit status 0 if it passed (2xx), 1 if not.
    """
    settings = context.settings()
    view, trial = run_async(_test(settings, endpoint_id, event_type))
    response = None if trial.outcome.response_head is None else trial.outcome.response_head.decode("utf-8", "replace")
    if json_out:
        print_json(
            {
                "endpoint_id": endpoint_id, "passed": trial.passed, "verdict": trial.verdict, "status": trial.outcome.status,
                "fault": trial.outcome.fault.value if trial.outcome.fault else None, "duration_ms": trial.duration_us / 1000,
                "request": trial.request.decode("utf-8", "replace"), "response": response,
            }
        )  # fmt: skip
    else:
        click.echo(f"{trial.verdict}   ({trial.duration_us / 1000:.1f} ms)")
        if response:
            click.echo("\n" + "\n".join("  " + line for line in response.splitlines()[:30]))
        if trial.passed and (view.state == "draft" or view.proposed):
            click.echo(f"Next:\n  dispatcher endpoint go-live {endpoint_id}")
    if not trial.passed:
        raise SystemExit(1)


async def _test(settings: Settings, endpoint_id: int, event_type: str) -> tuple[EndpointView, Trial]:
    async with admin(settings) as opened:
        view = await opened.get(endpoint_id)
        transport = make_transport(settings)
        try:
            trial = await try_endpoint(
                transport,
                parse_url(view.to_test["url"], settings.address_policy),
                view.secrets,
                view.account_id,
                timeout_s=view.to_test["timeout_ms"] / 1000,
                user_agent=settings.user_agent,
                event_type=event_type,
                data=_sample(event_type, view),
            )
        finally:
            await transport.close()
        outcome = trial.outcome
        await opened.record_test(
            view,
            passed=trial.passed,
            duration_us=trial.duration_us,
            status=outcome.status,
            fault=outcome.fault.value if outcome.fault else None,
            verdict=trial.verdict,
            request=trial.request,
            response_head=outcome.response_head,
        )
        return view, trial


def _sample(event_type: str, view: EndpointView) -> dict[str, Any]:
    if event_type == TEST_TYPE:
        return {
            "endpoint": {"id": view.id, "name": view.to_test["name"], "url": view.to_test["url"]},
            "sent_by": "dispatcher endpoint test",
        }
    try:
        return sample(event_type)
    except KeyError as exc:
        raise InputError(f"there is no sample of {event_type!r}; leave out --type to send {TEST_TYPE}") from exc


@endpoint.command("go-live")
@click.argument("endpoint_id", type=int)
@click.option("--force", is_flag=True, help="Without a passed test. Says so in the endpoint's record.")
@as_json
@click.pass_obj
def go_live(context: Context, endpoint_id: int, force: bool, json_out: bool) -> None:
    """Put a tested draft, or a tested edit, in force."""
    view = with_admin(context.settings(), lambda a: a.go_live(endpoint_id, force=force))
    if force and not view.tested:
        click.echo(f"warning: endpoint {endpoint_id} went live WITHOUT a passed test", err=True)
    _print(view, json_out)


@endpoint.command("list")
@click.option("--account", "account_id", help="Of this account only.")
@click.option("--state", type=click.Choice(["draft", "live", "paused", "disabled"]), help="In this state only.")
@click.option("--after", type=int, default=0, help="Begin after this endpoint id (to page).")
@as_json
@click.pass_obj
def list_endpoints(context: Context, account_id: str | None, state: str | None, after: int, json_out: bool) -> None:
    """List endpoints, a thousand at a time."""
    rows = with_admin(context.settings(), lambda a: a.endpoints(account_id, state, after=after))
    if json_out:
        print_json(rows)
        return
    columns = ("id", "account_id", "state", "event_types", "backlog", "url", "name")
    print_rows(rows, columns, "There are no endpoints. `dispatcher endpoint create ACCOUNT URL` makes one.")
    if len(rows) == 1_000:
        click.echo(f"… more: --after {rows[-1]['id']}")


@endpoint.command()
@click.argument("endpoint_id", type=int)
@click.option("--secret", "show_secret", is_flag=True, help="Show the signing secrets too.")
@as_json
@click.pass_obj
def show(context: Context, endpoint_id: int, show_secret: bool, json_out: bool) -> None:
    """Show one endpoint: configuration, state, what waits for it."""
    view = with_admin(context.settings(), lambda a: a.get(endpoint_id))
    _print(view, json_out, show_secret=show_secret)


@endpoint.command()
@click.argument("endpoint_id", type=int)
@click.option("--url", help="Another URL.")
@_config_options
@click.option("--live", is_flag=True, help="In force at once, without a test: for operators and scripts.")
@as_json
@click.pass_obj
def update(context: Context, /, endpoint_id: int, live: bool, json_out: bool, **given: Any) -> None:
    """Change an endpoint. The edit of an endpoint that is not a draft waits for `test` and `go-live`; the old one stays in force until then."""
    changes = _config(given)
    if not changes:
        raise InputError("nothing to change was given; see --help")
    view = with_admin(context.settings(), lambda a: a.update(endpoint_id, changes, live=live))
    _print(view, json_out)
    if not json_out and view.proposed is not None:
        click.echo(f"Next:\n  dispatcher endpoint test {endpoint_id}\n  dispatcher endpoint go-live {endpoint_id}")


@endpoint.command()
@click.argument("endpoint_id", type=int)
@as_json
@click.pass_obj
def pause(context: Context, endpoint_id: int, json_out: bool) -> None:
    """Stop deliveries to an endpoint within a second. Its events are held, and sent on resume."""
    _print(with_admin(context.settings(), lambda a: a.pause(endpoint_id)), json_out)


@endpoint.command()
@click.argument("endpoint_id", type=int)
@as_json
@click.pass_obj
def resume(context: Context, endpoint_id: int, json_out: bool) -> None:
    """Go on with a paused or disabled endpoint: what was held is sent, oldest first."""
    _print(with_admin(context.settings(), lambda a: a.resume(endpoint_id)), json_out)


@endpoint.command()
@click.argument("endpoint_id", type=int)
@click.option("--yes", is_flag=True, help="Don't ask.")
@as_json
@click.pass_obj
def delete(context: Context, endpoint_id: int, yes: bool, json_out: bool) -> None:
    """Delete an endpoint. What waits for it is never sent."""
    settings = context.settings()
    if not yes:
        view = with_admin(settings, lambda a: a.get(endpoint_id))
        click.confirm(
            f"Delete endpoint {endpoint_id} ({view.config['url']}), with what waits for it?", abort=True, err=True
        )
    with_admin(settings, lambda a: a.delete(endpoint_id))
    if json_out:
        print_json({"id": endpoint_id, "state": "deleted"})
    else:
        click.echo(f"endpoint {endpoint_id} deleted")


def _print(view: EndpointView, json_out: bool, *, show_secret: bool = False) -> None:
    shown = view.as_dict() | ({"secrets": list(view.secrets)} if show_secret else {})
    if json_out:
        print_json(shown)
        return
    for key, value in shown.items():
        if value not in (None, "", []):
            click.echo(f"{key:17} {', '.join(map(str, value)) if isinstance(value, list) else value}")
