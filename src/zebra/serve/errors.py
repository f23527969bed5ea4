"""An error of the API: an HTTP status and OpenAI's JSON."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client gets in place of an answer.

    Args:
        status: of HTTP.
        message: the rule, the value and the remedy.
        code: OpenAI's word for it, such as "context_length_exceeded".
        param: the field of the request.
        retry_after: seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON that clients read: `{"error": {"message", "type", "param", "code"}}`."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, **headers: str) -> JSONResponse:
        """The error as a response, with further headers."""
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.status == 401:
            headers.setdefault("www-authenticate", "Bearer")
        return JSONResponse(self.body(), self.status, headers)


def internal_error() -> ApiError:
    """What the server itself did wrong."""
    return ApiError(500, "the server failed on this request; its log says why.", code="internal_error")
