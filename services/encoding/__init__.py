"""Image and text towers: decoding, tokenizing, and backends behind one interface."""
