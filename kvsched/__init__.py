"""kvsched: load a long context's KV cache faster (SparKV), decode past what memory holds (DynaKV)."""

from .compose import SparKVDynaKVCache
from .config import DynaKVConfig, SparKVConfig
from .dynakv.cache import DynaKVCache
from .generation import disable, enable
from .hub import load_model
from .sparkv.cache import SparKVCache
from .sparkv.publish import publish

__all__ = [
    "DynaKVCache",
    "DynaKVConfig",
    "SparKVCache",
    "SparKVConfig",
    "SparKVDynaKVCache",
    "disable",
    "enable",
    "load_model",
    "publish",
]

enable()
