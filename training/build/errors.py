"""The one exception of a build that its user can act on."""


class BuildError(Exception):
    """A build cannot go on; the message says what to change."""
