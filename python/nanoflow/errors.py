"""What nanoflow raises beside ValueError and TypeError, which are for the caller's mistakes."""

from nanoflow._core import EngineError

__all__ = [
    "EngineError",
    "InvalidLogitsError",
    "QueueFullError",
    "RequestError",
    "StepError",
    "TextError",
]


class RequestError(EngineError):
    """One request has failed, alone; others go on."""


class InvalidLogitsError(RequestError):
    """The model gave a request logits that are no numbers."""

    def __init__(self, request_id: str, generated: int) -> None:
        super().__init__(
            f"request {request_id}: the logits after {generated} generated tokens hold NaN or "
            "infinity, or bad_words, allowed_token_ids and the like leave no token; check the "
            "model's weights, or load it with a wider dtype"
        )


class StepError(RequestError):
    """The engine failed while the request ran, and was restarted for others."""

    def __init__(self, request_id: str, cause: BaseException) -> None:
        super().__init__(f"request {request_id}: the engine failed while it ran: {cause}")
        self.__cause__ = cause


class TextError(RequestError):
    """The tokens that a request generated could not be read as text."""

    def __init__(self, request_id: str, cause: BaseException) -> None:
        super().__init__(
            f"request {request_id}: its tokens cannot be made text: {type(cause).__name__}: {cause}"
        )
        self.__cause__ = cause


class QueueFullError(RequestError):
    """As many requests, or tokens, wait as may."""

    def __init__(self, request_id: str, waiting: int, limit: int, unit: str) -> None:
        """`unit`: of the limit, reqs or tokens."""
        super().__init__(
            f"request {request_id}: the queue is full: {waiting} {unit} wait and "
            f"max_num_queued_{unit}={limit}; try again later, or raise it"
        )
        self.unit = unit
