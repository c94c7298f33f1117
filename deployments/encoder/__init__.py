"""The encoder: decoding, towers and dictionaries behind one batcher."""
