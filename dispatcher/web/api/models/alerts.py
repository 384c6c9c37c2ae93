"""Who is told of trouble by mail, and what they were told."""

from datetime import datetime
from typing import Annotated

from pydantic import Field, StringConstraints

from dispatcher.web.api.models.base import AccountId, Answer, Given


class NewRecipient(Given):
    address: Annotated[str, StringConstraints(min_length=3, max_length=254)] = Field(
        description="A mail address, in ASCII."
    )
    account_id: AccountId | None = Field(
        None, description="Whose endpoints. With an account's own key: that. Null, by an operator: everybody's."
    )


class RecipientAnswer(Answer):
    id: int
    account_id: str | None
    address: str
    created_at: datetime
    created_by: str


class AlertAnswer(Answer):
    id: int
    account_id: str
    to_operators: bool = Field(description="Told to operators; else to the account's recipients.")
    endpoint_id: int
    type: str
    at: datetime
    state: str = Field(
        description="waiting, held (the hour's mails are used up: told later, in one mail), mailed, given_up."
    )
    mailed_at: datetime | None


class OperatorAccount(Given):
    account_id: AccountId | None


class OperatorAccountAnswer(Answer):
    account_id: str | None
