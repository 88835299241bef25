"""The base of every configuration: frozen, checked when it is made, unknown keys refused."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen pydantic model that takes keyword arguments only and refuses keys it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )
