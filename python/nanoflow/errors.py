"""What nanoflow raises beside ValueError and TypeError, which are for the caller's mistakes."""

from nanoflow._core import EngineError

__all__ = ["EngineError", "InvalidLogitsError"]


class InvalidLogitsError(EngineError):
    """The model gave a request logits that are no numbers; other requests are not affected."""

    def __init__(self, request_id: str, generated: int) -> None:
        super().__init__(
            f"request {request_id}: the logits after {generated} generated tokens hold NaN or "
            "infinity; check the model's weights, or load it with a wider dtype"
        )
