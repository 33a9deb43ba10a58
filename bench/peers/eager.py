"""diffusers as it is."""

from .base import Peer

PEER = Peer("diffusers, eager", ("full",), lambda pipeline, setting, steps: pipeline)
