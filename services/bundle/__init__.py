"""A bundle on disk: its manifest, loading, checking, editing and comparing it."""
