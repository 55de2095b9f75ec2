"""For tests of programs that use the Hub: a Hub on loopback, with accounts, history and scripted faults."""

from lightning_lora.testing.hub_server import HubServer

__all__ = ["HubServer"]
