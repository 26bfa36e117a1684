"""What a model costs: bytes of cache and operations of a decoded token, against its predecessors."""
