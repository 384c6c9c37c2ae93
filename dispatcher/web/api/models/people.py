"""Accounts, keys, links, erasures, and who changed what."""

from datetime import datetime

from pydantic import Field

from dispatcher.store import access
from dispatcher.web.api.models.base import AccountId, Answer, EventRef, Given, Line, Paged


class AccountRow(Answer):
    account_id: str
    endpoints: int
    live: int
    disabled: int
    failing: int
    backlog: int


class AccountFilter(Paged):
    pass


class Me(Answer):
    """Who asks."""

    actor: str
    account_id: str | None = Field(description="Null: an operator.")
    is_operator: bool


class NewKey(Given):
    account_id: AccountId | None = Field(
        None, description="Left out: an operator's, or with an account's key another of its own."
    )
    name: Line = ""
    ttl_s: int | None = Field(None, ge=60, le=10 * 365 * 86_400, description="Left out: until it is revoked.")


class KeyAnswer(Answer):
    id: int
    account_id: str | None
    name: str
    prefix: str = Field(description="Its first characters.")
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None


class CreatedKey(KeyAnswer):
    key: str = Field(description="Shown now, and never again.")


class KeyFilter(Paged):
    account_id: AccountId | None = None
    revoked: bool = Field(False, description="Revoked ones too.")


class NewLink(Given):
    account_id: AccountId
    uses: int = Field(1, ge=1, le=access.LINK_USES_MAX, description="How often it can be opened.")
    ttl_s: int | None = Field(None, ge=10, le=access.LINK_S_MAX, description="Left out: DISPATCHER_PORTAL_LINK_S.")


class LinkAnswer(Answer):
    id: int
    account_id: str
    uses_left: int
    created_at: datetime
    created_by: str
    expires_at: datetime
    revoked_at: datetime | None


class CreatedLink(LinkAnswer):
    url: str = Field(description="Send the customer's browser there. Shown now, and never again.")


class NewErasure(Given):
    account_id: AccountId | None = Field(None, description="The whole account; or")
    event: EventRef | None = Field(None, description="one event.")


class ErasureAnswer(Answer):
    """What was erased. `ended_at` null: it is under way, or was interrupted; then ask for it again."""

    id: int
    account_id: str
    event_id: int | None
    events: int
    response_heads: int
    dead_letters: int
    tests: int
    endpoints: int
    erased_by: str
    began_at: datetime
    ended_at: datetime | None


class ChangeAnswer(Answer):
    """Who changed what through panel and API. `status` null: it was interrupted, or is under way."""

    id: int
    at: datetime
    actor: str
    account_id: str | None
    action: str
    subject: str
    address: str
    status: int | None


class SourceAddresses(Answer):
    data: list[str] = Field(description="Networks that POSTs come from; empty if nobody has said.")
