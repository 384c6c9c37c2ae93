"""`dispatcher endpoint …`: create, test, go live; then look after it."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import click

from dispatcher.cli import terminal
from dispatcher.cli.common import (
    DURATION,
    ID,
    Context,
    as_json,
    connected,
    print_json,
    print_rows,
    run_async,
    say,
    with_admin,
)
from dispatcher.cli.shape import described, shape_changes, shape_options, unset_options
from dispatcher.cli.terminal import ask, yes_option
from dispatcher.domain.signing import SCHEMES
from dispatcher.domain.text import amount, clean
from dispatcher.engine.trial import TEST_TYPE, Trial
from dispatcher.errors import InputError, SealedError
from dispatcher.main import make_transport
from dispatcher.settings import Settings
from dispatcher.store.admin import Admin, Choice
from dispatcher.store.endpoint import CONFIG_FIELDS, EndpointDetails, EndpointView, Waiting, counted
from dispatcher.web.trial import shown_trial, try_and_record


@click.group()
def endpoint() -> None:
    """Create endpoints, test them, put them live, and look after them.

    An endpoint begins as a draft and gets nothing. `test` sends it one real, signed POST; a passed test belongs to that exact configuration and
    lets it `go-live`. An edit of a live endpoint waits beside it until its own test has passed.

    `pause` and `resume` are for an owner's own pauses; an endpoint that failed for days, or answered 410, is disabled until somebody says
    `enable`. Whether events of that time are sent or skipped is a choice; what is never sent is counted.
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
            click.option(
                "--filter",
                "filters",
                multiple=True,
                metavar="FIELD=VALUE",
                help="Only events with this value in this field. Repeat it: one of a field's values is enough, each field must have one.",
            ),
            click.option(
                "--response-control/--no-response-control",
                default=None,
                help="Obey `webhook-delivery: disable` and `abort-message` in its answers. [default: no]",
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
            click.option(
                "--ordering",
                help="Of events with an ordering key: off, block (one that fails holds back its key), or 'give_up_after N' attempts. "
                "[default: off]",
            ),
        )
    ):
        command = option(command)
    return command


def _config(given: dict[str, Any]) -> dict[str, Any]:
    """Turn options that were given into configuration."""
    shape = shape_changes(given)
    config = shape | {key: value for key, value in given.items() if value not in (None, ())}
    if "event_types" in config:
        config["event_types"] = list(config["event_types"])
    if "filters" in config:
        config["filters"] = _filters(config["filters"])
    if config.pop("no_filters", False):
        if "filters" in config:
            raise InputError("give --filter or --no-filters, not both")
        config["filters"] = {}
    if "retry_schedule" in config:
        text = config.pop("retry_schedule")
        try:
            config["retry_schedule_s"] = [int(part) for part in text.split(",")]
        except ValueError as exc:
            raise InputError(f"--retry-schedule {text!r} is not a list of seconds such as 5,30,120") from exc
    return config


def _filters(given: Iterable[str]) -> dict[str, list[str]]:
    filters: dict[str, list[str]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--filter {text!r} is not FIELD=VALUE, such as status=delivered")
        filters.setdefault(name, []).append(value)
    return filters


@endpoint.command()
@click.argument("account_id")
@click.argument("url")
@_config_options
@shape_options
@click.option("--secret", help="Signing secret (whsec_…), or private key (whsk_…). [default: a new one]")
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
        print_json(view.as_dict() | _for_receiver(view))
        return
    say(f"endpoint {view.id} ({view.state})")
    for label, value in _for_receiver(view).items():
        if value is not None:
            say(f"{label.replace('_', ' '):8} {value}")
    if live:
        say("It gets events from now on.")
    else:
        say("It gets nothing yet. Next:")
        say(f"  dispatcher endpoint test {view.id}")
        say(f"  dispatcher endpoint go-live {view.id}")


def _for_receiver(view: EndpointView) -> dict[str, str | None]:
    """Return what its receiver needs to check the newest signatures: shown now, and later when somebody asks for it."""
    signing = view.to_test["signing"].split(",")
    secret = next((s.secret for s in view.signing if s.scheme == "v1"), None) if "v1" in signing else None
    public = view.public_keys[0] if "v1a" in signing and view.public_keys else None
    given: dict[str, str | None] = {"secret": secret, "public_key": public}
    key = view.to_test["extra_signature_key"]
    return given | ({} if key is None else {"extra_signature_key": key})


@endpoint.command()
@click.argument("endpoint_id", type=ID)
@click.option("--type", "event_type", default=TEST_TYPE, show_default=True, help="Send the sample of this event type.")
@as_json
@click.pass_obj
def test(context: Context, endpoint_id: int, event_type: str, json_out: bool) -> None:
    """Send one real, signed POST, marked as a test, and say what came of it.

    Exit status 0 if it passed (2xx), 1 if not.

    \b
    dispatcher endpoint test 7 --type message.delivered
    """
    settings = context.settings()
    view, trial = run_async(_test(settings, endpoint_id, event_type))
    shown = shown_trial(event_type, trial)
    if json_out:
        print_json({"endpoint_id": endpoint_id, **shown})
    else:
        say(f"{trial.verdict}   ({trial.duration_us / 1000:.1f} ms)")
        parts = [
            f"{name.replace('_', ' ')} {took:.1f} ms" for name, took in shown["timing"].items() if took is not None
        ]
        if parts:
            say("  " + ", ".join(parts))
        if shown["response"]:
            say("\n" + "\n".join("  " + line for line in shown["response"].splitlines()[:30]))
        if trial.passed and (view.state == "draft" or view.proposed):
            say(f"Next:\n  dispatcher endpoint go-live {endpoint_id}")
    if not trial.passed:
        raise SystemExit(1)


async def _test(settings: Settings, endpoint_id: int, event_type: str) -> tuple[EndpointView, Trial]:
    async with connected(settings) as connection:
        transport = make_transport(settings)
        lent = connection, Admin(connection, settings)
        try:
            return await try_and_record(
                lambda: nullcontext(lent), transport, settings, endpoint_id, event_type, "dispatcher endpoint test"
            )
        finally:
            await transport.close()


@endpoint.command("go-live")
@click.argument("endpoint_id", type=ID)
@click.option("--force", is_flag=True, help="Without a passed test. Says so in the endpoint's record and in the log.")
@as_json
@click.pass_obj
def go_live(context: Context, endpoint_id: int, force: bool, json_out: bool) -> None:
    """Put a tested draft, or a tested edit, in force.

    \b
    dispatcher endpoint test 7
    dispatcher endpoint go-live 7
    """
    view = with_admin(context.settings(), lambda a: a.go_live(endpoint_id, force=force))
    if force and not view.tested:
        say(
            f"warning: endpoint {endpoint_id} went live WITHOUT a passed test: nobody knows whether {view.config['url']} takes its events",
            err=True,
        )
    _report(view, json_out, f"endpoint {endpoint_id} is {view.state}, with this configuration in force")


@endpoint.command("list")
@click.option("--account", "account_id", help="Of this account only.")
@click.option("--state", type=click.Choice(["draft", "live", "paused", "disabled"]), help="In this state only.")
@click.option("--after", type=ID, default=0, help="Begin after this endpoint id (to page).")
@as_json
@click.pass_obj
def list_endpoints(context: Context, account_id: str | None, state: str | None, after: int, json_out: bool) -> None:
    """List endpoints, a thousand at a time; those that fail are marked.

    \b
    dispatcher endpoint list --account acct_1
    """
    rows = with_admin(context.settings(), lambda a: a.endpoints(account_id, state, after=after))
    if json_out:
        print_json(rows)
        return
    for row in rows:
        row["state"] = ", ".join(
            word for word, applies in (
                (row["state"], True), ("FAILING", row["failing"]), ("edit waits", row["has_draft"]),
            ) if applies
        )  # fmt: skip
    columns = ("id", "account_id", "state", "event_types", "backlog", "url", "name")
    print_rows(rows, columns, "There are no endpoints. `dispatcher endpoint create ACCOUNT URL` makes one.")
    if len(rows) == 1_000:
        say(f"… more: --after {rows[-1]['id']}")


@endpoint.command()
@click.argument("endpoint_id", type=ID)
@click.option("--secret", "show_secret", is_flag=True, help="Reveal the signing secrets too, and when they expire.")
@click.option("--subscriptions", is_flag=True, help="Show the ids of events for which each subscription is valid.")
@as_json
@click.pass_obj
def show(context: Context, endpoint_id: int, show_secret: bool, subscriptions: bool, json_out: bool) -> None:
    """Show one endpoint: state, configuration, what waits for it and what it will never get.

    Its public keys are shown, its secrets with --secret only, which the audit tells. Values of headers, passwords, tokens and client keys
    never are.

    \b
    dispatcher endpoint show 7 --subscriptions
    """

    async def work(opened: Admin) -> tuple[EndpointView, EndpointDetails]:
        view = await (opened.reveal if show_secret else opened.get)(endpoint_id)
        return view, await opened.details(view)

    view, details = with_admin(context.settings(), work)
    if json_out:
        secrets = [
            {"scheme": s.scheme, "public_key": s.public_key, "created_at": s.created_at, "expires_at": s.expires_at}
            | ({"secret": s.secret if s.public_key is None else None} if show_secret else {})
            for s in view.signing
        ]
        revealed = (
            dict(zip(("extra_signature_key", "proposed_extra_signature_key"), view.extra_keys, strict=True))
            if show_secret
            else {}
        )
        print_json(view.as_dict() | details.as_dict() | {"secrets": secrets} | revealed)
        return
    for label, value in _described(view, details, secret=show_secret, subscriptions=subscriptions):
        say(f"{label:16} {clean(str(value))}".rstrip())


@endpoint.command()
@click.argument("endpoint_id", type=ID)
@click.option("--url", help="Another URL.")
@_config_options
@shape_options
@unset_options
@click.option("--no-filters", is_flag=True, help="No field filters any more: every event of its types.")
@click.option("--live", is_flag=True, help="In force at once, without a test: for operators and scripts.")
@as_json
@click.pass_obj
def update(context: Context, /, endpoint_id: int, live: bool, json_out: bool, **given: Any) -> None:
    """Change an endpoint. The edit of an endpoint that is not a draft waits for `test` and `go-live`; the old one stays in force until then.

    \b
    dispatcher endpoint update 7 --url https://example.com/new
    """
    changes = _config(given)
    if not changes:
        raise InputError("nothing to change was given; see --help")
    view = with_admin(context.settings(), lambda a: a.update(endpoint_id, changes, live=live))
    if changes.get("extra_signature") and not json_out:
        say(f"extra signature key {view.to_test['extra_signature_key']}")
    if view.state == "draft" or live:
        _report(view, json_out, f"endpoint {endpoint_id} changed")
    elif view.proposed is None:
        _report(view, json_out, f"endpoint {endpoint_id} stays as it is; no edit waits")
    else:
        edit = "\n".join(f"  {field}: {_value(now)} → {_value(new)}" for field, (now, new) in view.changes.items())
        commands = f"  dispatcher endpoint test {endpoint_id}\n  dispatcher endpoint go-live {endpoint_id}"
        _report(
            view,
            json_out,
            f"endpoint {endpoint_id} stays as it is until this has passed its test:\n{edit}\nNext:\n{commands}",
        )


@endpoint.command()
@click.argument("endpoint_id", type=ID)
@click.option("--skip", is_flag=True, help="Events from now on are never sent; they are counted on resume.")
@as_json
@click.pass_obj
def pause(context: Context, endpoint_id: int, skip: bool, json_out: bool) -> None:
    """Stop deliveries to an endpoint within a second.

    Its events are held, and sent on resume; with --skip they are not. What was handed out before the pause stays owed in either case.

    \b
    dispatcher endpoint pause 7
    """
    view = with_admin(context.settings(), lambda a: a.pause(endpoint_id, skip=skip))
    what = "SKIPPED" if skip else "held"
    _report(view, json_out, f"endpoint {endpoint_id} is paused; its events from now on are {what}")


def _send_or_skip(command: Any) -> Any:
    for option in (
        click.option("--skip", "choice", flag_value="skip", help="Never send what was held; it is counted."),
        click.option("--send", "choice", flag_value="send", help="Send what was held, oldest first."),
    ):
        command = option(command)
    return command


@endpoint.command()
@click.argument("endpoint_id", type=ID)
@_send_or_skip
@as_json
@click.pass_obj
def resume(context: Context, endpoint_id: int, choice: Choice | None, json_out: bool) -> None:
    """Go on with a paused endpoint. What was held is sent, oldest first, unless you say --skip.

    \b
    dispatcher endpoint resume 7 --skip
    """
    view, skipped = with_admin(context.settings(), lambda a: a.resume(endpoint_id, choice))
    _report(view, json_out, f"endpoint {endpoint_id} is live{_skipped(skipped)}", skipped=skipped)


@endpoint.command()
@click.argument("endpoint_id", type=ID)
@click.option("--reason", help="For its record, such as a ticket. [default: by operator]")
@as_json
@click.pass_obj
def disable(context: Context, endpoint_id: int, reason: str | None, json_out: bool) -> None:
    """Stop deliveries to an endpoint until somebody enables it, and tell its account (endpoint.disabled).

    The dispatcher does the same to one that fails for days or answers 410. Its events are held.

    \b
    dispatcher endpoint disable 7 --reason 'ticket 4711'
    """
    view = with_admin(context.settings(), lambda a: a.disable(endpoint_id, reason))
    _report(view, json_out, f"endpoint {endpoint_id} is disabled; its events are held")


@endpoint.command()
@click.argument("endpoint_id", type=ID)
@_send_or_skip
@as_json
@click.pass_obj
def enable(context: Context, endpoint_id: int, choice: Choice | None, json_out: bool) -> None:
    """Put a disabled endpoint live again, and tell its account (endpoint.recovered).

    On a terminal it shows how many events were held and asks whether to send or to skip them; in a script say which.

    \b
    dispatcher endpoint enable 7 --send
    """

    async def work(opened: Admin) -> tuple[EndpointView, int]:
        chosen = choice
        if chosen is None and terminal.can_ask():
            view = await opened.get(endpoint_id)
            if view.state == "disabled":
                chosen = _ask(view, await opened.waiting(view))
        return await opened.enable(endpoint_id, chosen)

    view, skipped = with_admin(context.settings(), work)
    _report(view, json_out, f"endpoint {endpoint_id} is live{_skipped(skipped)}", skipped=skipped)


def _ask(view: EndpointView, waiting: Waiting) -> Choice | None:
    """Ask what to do with what was held; None if there is nothing."""
    if not waiting.held:
        return None
    since = f"{view.state_changed_at:{_TIME}} ({view.state_reason})"
    say(f"endpoint {view.id} is disabled since {since}; held since then: {counted(waiting.held)}", err=True)
    if waiting.before or waiting.retries:
        say(f"in either case it gets what waits from before: {_before(waiting)}", err=True)
    answer: Choice = click.prompt("Send or skip what was held?", type=click.Choice(["send", "skip"]), err=True)
    return answer


def _before(waiting: Waiting) -> str:
    return f"{counted(waiting.before)} not tried yet, {amount(waiting.retries, 'that waits', 'that wait')} for a retry"


def _skipped(skipped: int) -> str:
    return f"; deliveries skipped: {skipped:,}" if skipped else ""


@endpoint.command("rotate-secret")
@click.argument("endpoint_id", type=ID)
@click.option(
    "--overlap",
    "overlap_s",
    type=DURATION,
    default="24h",
    show_default=True,
    help="How long the old secret signs too: 30s, 90m, 24h, 2d; 0 ends it at once.",
)
@click.option(
    "--scheme",
    type=click.Choice(SCHEMES),
    help="Of an endpoint that signs in both: v1's secret, or v1a's key. [default: the first it signs in]",
)
@click.option("--secret", help="The new signing secret (whsec_…) or private key (whsk_…). [default: a new one]")
@as_json
@click.pass_obj
def rotate_secret(
    context: Context, endpoint_id: int, overlap_s: float, scheme: str | None, secret: str | None, json_out: bool
) -> None:
    """Give an endpoint a new signing secret, or key. During the overlap both sign, so that its receiver can change over.

    \b
    dispatcher endpoint rotate-secret 7 --overlap 2d
    """
    view = with_admin(
        context.settings(), lambda a: a.rotate_secret(endpoint_id, overlap_s=overlap_s, secret=secret, scheme=scheme)
    )
    new = view.signing[0]
    old = [known for known in view.signing[1:] if known.scheme == new.scheme]
    until = max((s.expires_at for s in old if s.expires_at is not None), default=None)
    given = {"secret": new.secret} if new.public_key is None else {"public_key": new.public_key}
    if json_out:
        print_json(view.as_dict() | given | {"scheme": new.scheme, "old_sign_until": until})
        return
    for label, value in given.items():
        say(f"{label.replace('_', ' '):8} {value}")
    if until is None:
        say("The old one signs no more.")
    else:
        say(f"The old {'one signs' if len(old) == 1 else 'ones sign'} too until {until:{_TIME}}.")


@endpoint.command()
@click.argument("endpoint_id", type=ID)
@yes_option
@as_json
@click.pass_obj
def delete(context: Context, endpoint_id: int, yes: bool, json_out: bool) -> None:
    """Delete an endpoint. What waits for it is never sent; it is counted as discarded.

    \b
    dispatcher endpoint delete 7
    """

    async def work(opened: Admin) -> int:
        if not yes:
            view = await opened.get(endpoint_id)
            waiting = await opened.waiting(view)
            due = counted(waiting.held + waiting.before + waiting.retries)
            url = view.config["url"]
            ask(
                f"Delete endpoint {endpoint_id} ({url})? Deliveries that wait for it and would never be sent: {due}.",
                yes=yes,
            )
        return await opened.delete(endpoint_id)

    discarded = with_admin(context.settings(), work)
    if json_out:
        print_json({"id": endpoint_id, "state": "deleted", "discarded": discarded})
    else:
        say(f"endpoint {endpoint_id} is deleted; deliveries that waited for it and are never sent: {discarded:,}")


_TIME = "%Y-%m-%d %H:%M:%S UTC"


def _report(view: EndpointView, json_out: bool, sentence: str, **more: Any) -> None:
    """Say in a sentence, or as JSON, what a verb came to."""
    if json_out:
        print_json(view.as_dict() | more)
    else:
        say(sentence)


def _described(
    view: EndpointView, details: EndpointDetails, *, secret: bool, subscriptions: bool
) -> Iterator[tuple[str, Any]]:
    """Yield (label, value) lines: what it is, how it stands, what it is configured to."""
    reason = f" ({view.state_reason})" if view.state_reason else ""
    yield "endpoint", f"{view.id}  {view.config['name']}"
    yield "account", view.account_id
    yield "state", f"{view.state} since {view.state_changed_at:{_TIME}}{reason}"
    if view.failing_since is not None:
        yield "FAILING", f"no success since {view.failing_since:{_TIME}}"
    for field in CONFIG_FIELDS[1:]:
        yield field, _value(view.config[field])
    yield from described(view, reveal=secret)
    for key in view.signing:
        if key.public_key is not None:
            until = "" if key.expires_at is None else f"  until {key.expires_at:{_TIME}}"
            yield "public key", f"{key.public_key}{until}"
    yield from _described_edit(view)
    waiting = details.waiting
    if waiting is None:
        yield "backlog", f"{view.backlog:,}"
    else:
        held = "events since then are skipped" if waiting.skipping else counted(waiting.held)
        yield "held", f"{held}; from before: {counted(waiting.before)}"
    yield "retries", f"{view.retries:,}"
    yield "dead letters", f"{view.dead_letters:,}"
    yield "expired", f"{view.expired:,} in 24 h, unsent at their events' expires_at"
    yield "never sent", ", ".join(f"{count:,} {reason}" for reason, count in details.discards.items()) or "0"
    for run in details.runs:
        yield (
            "run",
            f"{run['id']} ({run['source']}) {run['state']}: {run['attempted']:,} of {run['total']:,}, {run['delivered']:,} delivered",
        )
    if secret:
        for known in view.signing:
            if known.public_key is not None:
                continue  # its private key stays here
            until = "" if known.expires_at is None else f"  until {known.expires_at:{_TIME}}"
            yield "secret", f"{known.secret}{until}"
    if subscriptions:
        for row in details.subscriptions:
            until = "" if row["until_id"] is None else f" up to {row['until_id']}"
            yield "subscription", f"{row['pattern']}  ids above {row['since_id']}{until}"
    yield "created", f"{view.created_at:{_TIME}}"


def _described_edit(view: EndpointView) -> Iterator[tuple[str, Any]]:
    try:
        changes, tested = view.changes, view.tested
    except SealedError as exc:
        yield "tested", f"can't be told: {exc}"
        return
    for n, (field, (now, proposed)) in enumerate(changes.items()):
        yield "" if n else "proposed edit", f"{field}: {_value(now)} → {_value(proposed)}"
    what = "the edit" if changes else "this configuration"
    passed = "has passed its test" if tested else f"has NOT passed a test: `dispatcher endpoint test {view.id}`"
    yield "tested", f"{what} {passed}"


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        if any(isinstance(given, list) for given in value.values()):  # filters
            return "  ".join(f"{name}={','.join(given)}" for name, given in value.items())
        return ", ".join(f"{name}: {hidden}" for name, hidden in value.items()) or "–"  # headers
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text or "–"
