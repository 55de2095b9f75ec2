"""What the tests of a run's parts have: tiny models, a cache of `datasets` of their own, and a quiet Trainer."""

from tests.recipes.conftest import bert, llama, own_cache, trainer, vit  # noqa: F401
