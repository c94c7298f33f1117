"""The generator: a bundle's pipeline behind an engine that runs one denoising step at a time."""
