"""Parts of the bias study: what it looks at, what it compares, and its pages."""
