"""Text to frozen batches of tokens."""

from hesscope.data.batching import batches_of_sequences, check_batches
from hesscope.data.reading import Source, read
from hesscope.data.tokens import sequences_of

__all__ = ["Source", "batches_of_sequences", "check_batches", "read", "sequences_of"]
