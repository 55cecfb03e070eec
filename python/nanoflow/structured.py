"""What a generation must conform to, with vLLM's names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

_KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """Exactly one of json, regex, choice, grammar and json_object.

    Raises ValueError naming what is wrong, TypeError on a value of another type. Whether a schema,
    expression or grammar is valid is found out when a request brings it: it then fails alone.
    """

    json: str | Mapping[str, Any] | None = None  # a JSON schema
    regex: str | None = None  # of the whole text, in the syntax of Rust's regex crate
    choice: Sequence[str] | None = None  # the text is one of them
    grammar: str | None = None  # in the syntax of llguidance (Lark), or EBNF or GBNF with ::=
    json_object: bool | None = None  # any JSON object
    disable_any_whitespace: bool = False  # in JSON
    whitespace_pattern: str | None = None  # an expression: what JSON may have as white space

    def __post_init__(self) -> None:
        self._check_types()
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            what = f"{', '.join(given)} are given" if given else "none is given"
            raise ValueError(
                f"structured outputs take exactly one of {', '.join(_KINDS)}, but {what}"
            )
        if self.choice is not None and not (self.choice and all(self.choice)):
            raise ValueError(f"choice={list(self.choice)} must hold texts, none of them empty")
        is_json = given[0] in ("json", "json_object")
        if not is_json and (self.disable_any_whitespace or self.whitespace_pattern is not None):
            raise ValueError(
                "disable_any_whitespace and whitespace_pattern are for json and json_object, not "
                f"for {given[0]}"
            )
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError("disable_any_whitespace and whitespace_pattern exclude each other")

    def _check_types(self) -> None:
        if not isinstance(self.json, str | Mapping | None):
            raise TypeError(f"json={self.json!r} must be a JSON schema, as a text or a dict")
        for name in ("regex", "grammar", "whitespace_pattern"):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(f"{name}={getattr(self, name)!r} must be a text")
        if isinstance(self.choice, str) or not all(
            isinstance(text, str) for text in self.choice or ()
        ):
            raise TypeError(f"choice={self.choice!r} must be a list of texts")
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool | None):
                raise TypeError(f"{name}={getattr(self, name)!r} must be True or False")

    @property
    def schema(self) -> str | None:
        """The JSON schema as a text, if there is one. Raises ValueError where it is no JSON."""
        if self.json_object:
            return '{"type": "object"}'
        if self.json is None:
            return None
        try:
            schema = json.loads(self.json) if isinstance(self.json, str) else self.json
            return json.dumps(schema)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the JSON schema is no JSON: {error}") from error


def parse_structured(body: Mapping[str, Any]) -> StructuredOutputsParams | None:
    """What the body of an OpenAI request asks for: `structured_outputs`, as in vLLM, or
    `response_format`. Raises ValueError or TypeError on anything else."""
    structured, form = body.get("structured_outputs"), body.get("response_format")
    if structured is not None and form is not None:
        raise ValueError("structured_outputs and response_format exclude each other")
    if structured is not None:
        if not isinstance(structured, Mapping):
            raise TypeError(f"structured_outputs={structured!r} must be an object")
        known = [field.name for field in fields(StructuredOutputsParams)]
        if unknown := sorted(structured.keys() - known):
            raise ValueError(f"structured_outputs has no {unknown[0]!r}; it has {', '.join(known)}")
        return StructuredOutputsParams(**structured)
    match form:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return StructuredOutputsParams(json_object=True)
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return StructuredOutputsParams(json=schema)
    raise ValueError(
        f"response_format={form!r} must have the type text, json_object or json_schema, and the "
        "last a json_schema with a schema"
    )
