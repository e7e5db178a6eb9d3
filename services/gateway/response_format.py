"""`response_format` of chat requests: text, any JSON object, or JSON of a schema."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from services.gateway.json_body import Body

_ANY_OBJECT = json.dumps({"type": "object"})


class TextFormat(Body):
    """Whatever the model writes."""

    type: Literal["text"]

    @property
    def json_schema_text(self) -> None:
        """No constraint."""
        return None


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]

    @property
    def json_schema_text(self) -> str:
        """The schema that the answer must fit."""
        return _ANY_OBJECT


class NamedSchema(Body):
    """A schema with its name. The answer fits it whether `strict` is asked for or not."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Annotated[str, StringConstraints(max_length=8192)] | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class JsonSchemaFormat(Body):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema

    @property
    def json_schema_text(self) -> str:
        """The schema that the answer must fit."""
        schema = self.json_schema.schema_
        return _ANY_OBJECT if schema is None else json.dumps(schema)


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
