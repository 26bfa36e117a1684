"""What sequences remember: window and compressor rings in slots, compressed entries and index keys in pages."""

from abyssal.kvcache.memory import LayerMemory, Memory
from abyssal.kvcache.sequence import SequenceCache

__all__ = ["LayerMemory", "Memory", "SequenceCache"]
