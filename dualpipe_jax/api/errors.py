"""Errors, in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any

_KINDS = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that is refused, or that failed.

    Examples:
      >>> ApiError(400, "n=0 must be at least 1.", param="n").content()
      {'error': {'message': 'n=0 must be at least 1.', 'type': ..., 'param': 'n', ...}}
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
    ):
        """Makes an error.

        Args:
          status: of HTTP.
          message: for people.
          param: the field of the request that is wrong.
          code: for programs.
        """
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def content(self) -> dict[str, Any]:
        """Returns the response's JSON."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """Headers beside the usual ones: when to try again, how to authenticate."""
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {"retry-after": "1"} if self.status in (429, 503) else {}
