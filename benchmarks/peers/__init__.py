"""The same ViT-B-32 behind this service and behind what it will be compared with."""
