"""Image and text towers: decoding, tokenising, and backends behind one interface."""
