"""Steered text-to-image generation: the steering maths, and Stable Diffusion run one step at a time."""
