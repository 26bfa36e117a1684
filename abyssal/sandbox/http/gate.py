"""The gate before an edge: who calls, which sandboxes are his, and whether he may have more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abyssal.sandbox.edge import Edge
from abyssal.sandbox.errors import NotFound, QuotaExceeded
from abyssal.sandbox.http.access import Access, Caller


class Gate:
    """An edge and who may reach what of it."""

    def __init__(self, edge: Edge, access: Access):
        self.edge, self.access = edge, access

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Who calls, by his headers.

        Raises:
            Unauthorised: nobody we know.
        """
        scheme, _, token = headers.get("authorization", "").partition(" ")
        return self.access.caller(token.strip() if scheme.lower() == "bearer" else None)

    def mine(self, caller: Caller, info: Mapping[str, Any]) -> bool:
        """Whether a sandbox is the caller's."""
        return caller.sandbox in (None, info["id"]) and (self.access.open or info["actor"] == caller.actor)

    async def allowed(self, caller: Caller, sandbox: str) -> Mapping[str, Any]:
        """What is known of a sandbox, if it is the caller's; another's looks as if it did not exist.

        Raises:
            NotFound: no such sandbox of the caller's.
        """
        info = await self.edge.info(sandbox)
        if not self.mine(caller, info):
            raise NotFound(f"no sandbox {sandbox} on edge {self.edge.id}")
        return info

    async def check_quota(self, caller: Caller) -> None:
        """Insist on room in the caller's quota.

        Raises:
            QuotaExceeded: there is none.
        """
        count = sum(info["actor"] == caller.actor for info in await self.edge.list({}))
        if caller.sandboxes is not None and count >= caller.sandboxes:
            raise QuotaExceeded(f"project {caller.actor} has the {caller.sandboxes} sandboxes that it may have")
