"""The emoji corpus: several artists' drawings of the same concepts, with captions and attributes."""
