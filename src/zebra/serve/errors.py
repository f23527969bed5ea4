"""API errors: an HTTP status with OpenAI's JSON."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error that is returned to the client.

    Args:
        status: HTTP status code.
        message: the rule, the value seen and the remedy.
        code: error code as in OpenAI's API, such as "context_length_exceeded".
        param: the request field at fault.
        retry_after: seconds after which the client should try again, sent as the header Retry-After.
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
        """The JSON body: `{"error": {"message", "type", "param", "code"}}`."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, **headers: str) -> JSONResponse:
        """The error as a response, with these additional headers."""
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.status == 401:
            headers.setdefault("www-authenticate", "Bearer")
        return JSONResponse(self.body(), self.status, headers)


def internal_error() -> ApiError:
    """The error of an unexpected failure in the server, without its details."""
    return ApiError(500, "internal server error on this request. See the server's log.", code="internal_error")
