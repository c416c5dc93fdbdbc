"""SiVA: the top singular triplets of a weight train, the rest is frozen. A PEFT method."""

from fastpeft.siva.config import SivaConfig
from fastpeft.siva.layer import SivaLinear
from fastpeft.siva.model import SivaModel, register

__all__ = ["SivaConfig", "SivaLinear", "SivaModel"]

register()
