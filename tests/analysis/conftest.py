"""The Hub on loopback, for the tests of this folder."""

from tests.hub_server.plugin import hub

__all__ = ["hub"]
