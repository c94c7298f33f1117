"""What the gateway computes itself, with numpy, from the bundle's tables and decoders."""
