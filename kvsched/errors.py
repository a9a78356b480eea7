"""The exceptions a user can meet, each with a message that names the fix."""


class KVSchedError(Exception):
    """Root of everything kvsched raises on purpose."""


class ConfigError(KVSchedError, ValueError):
    """An option is unknown, has the wrong type or lies outside its range."""


class ModelNotFoundError(KVSchedError, OSError):
    """No local folder, hub or package could provide the model that was asked for."""


class PackageError(KVSchedError, OSError):
    """A package could not be had from its registry, or is not the one that was expected."""


class DataNotFoundError(KVSchedError, OSError):
    """Evaluation data is not on this machine, or could not be fetched."""


class UnsupportedModelError(KVSchedError, TypeError):
    """The model's layers or its attention cannot work with the cache that was asked for."""


class InputError(KVSchedError, ValueError):
    """Token ids or an attention mask that the caches cannot serve, such as right padding."""


class StoreError(KVSchedError, OSError):
    """A chunk store that cannot be opened, reached or written."""


class ChunkError(KVSchedError, ValueError):
    """Bytes that are not the chunk they were fetched as: truncated, altered, foreign or of another version."""


class FlashError(KVSchedError, OSError):
    """The cluster files on flash cannot be created, read or written."""


class TraceError(KVSchedError, ValueError):
    """A file that is no trace of a run, or one that cannot be written."""
