"""Errors as HTTP answers, in each vendor's shape (api.md 7)."""

from __future__ import annotations

from typing import Any

from abyssal.base.errors import AbyssalError, CapacityError, ContextError, InputError, RunError


class ApiError(AbyssalError):
    """An error that a client sees.

    Args:
        status: HTTP status.
        message: one sentence that names the value and the remedy.
        param: path of the field, or None.
        code: the vendor's short name, or None.
        retry_after: seconds after which to try again, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def openai(self) -> dict[str, Any]:
        """The body in OpenAI's shape."""
        kinds = {401: "authentication_error", 402: "insufficient_balance", 404: "not_found_error",
                 429: "rate_limit_error"}  # fmt: skip
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self, request: str) -> dict[str, Any]:
        """The body in Anthropic's shape.

        Args:
            request: the request's id.
        """
        kinds = {401: "authentication_error", 402: "billing_error", 404: "not_found_error", 413: "request_too_large",
                 429: "rate_limit_error", 503: "overloaded_error"}  # fmt: skip
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": str(self)}, "request_id": request}


def api_error(error: AbyssalError) -> ApiError:
    """What a client sees of an error of ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, CapacityError):
        return ApiError(503, str(error), code="overloaded", retry_after=10)
    if isinstance(error, InputError):
        return ApiError(400, str(error), code="context_length_exceeded" if isinstance(error, ContextError) else None)
    assert isinstance(error, RunError)
    return ApiError(500, str(error))
