"""Who may call what, and over which wire."""
