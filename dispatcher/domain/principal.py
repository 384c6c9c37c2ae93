"""Who asks: an operator, who may see and change everything, or an account, which has its own rows and no others.

Every question that panel and API put to the database takes one. What belongs to another account isn't forbidden, it
isn't there: an id that is somebody else's is answered as one that never was.
"""

from dataclasses import dataclass

from dispatcher.errors import ForbiddenError


@dataclass(frozen=True, slots=True)
class Principal:
    """`actor` is for the audit: who, as people would name them."""

    actor: str
    account_id: str | None = None

    @property
    def is_operator(self) -> bool:
        return self.account_id is None

    def sees(self, account_id: str | None) -> bool:
        return self.account_id is None or self.account_id == account_id

    def within(self, account_id: str | None) -> str | None:
        """Return the account that a list is of: the one asked for, or an account's own; None is every account."""
        if account_id is not None and not self.sees(account_id):
            raise ForbiddenError(f"this is a login of account {self.account_id}; it has no access to others")
        return self.account_id if account_id is None else account_id


OPERATOR = Principal("command line")
