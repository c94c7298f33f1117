"""The text-to-image model: drawings, training, the pipeline it is exported as, and the settings chosen for it."""
