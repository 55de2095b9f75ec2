"""The Hub on loopback, and an adapter there, for the tests of this folder."""

from tests.hub.conftest import files, hub, repository, source

__all__ = ["files", "hub", "repository", "source"]
