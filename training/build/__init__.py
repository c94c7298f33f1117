"""Make a bundle of one's own: any open_clip model and image-text pairs in, a bundle that serves out."""
