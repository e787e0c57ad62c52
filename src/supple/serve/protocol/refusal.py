"""`Refused`, the exception that ends a request with a status and a reason."""

from typing import NoReturn, final


@final
class Refused(Exception):
    """A request is refused with an HTTP `status`; the message is the reason."""

    def __init__(self, message: str, status: int = 400, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


def refuse(message: str, status: int = 400) -> NoReturn:
    """Raise `Refused`."""
    raise Refused(message, status)
