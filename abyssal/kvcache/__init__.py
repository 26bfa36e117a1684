"""What a sequence remembers: window entries, compressed entries, index keys and unfinished tails."""

from abyssal.kvcache.sequence import LayerCache, SequenceCache, Snapshot

__all__ = ["LayerCache", "SequenceCache", "Snapshot"]
