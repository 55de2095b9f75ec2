"""For tests of programs that use the Hub: a Hub on loopback, with accounts, history and scripted faults."""

from tests.hub_server.server import HubServer

__all__ = ["HubServer"]
