"""The documentation is true: pages are what they are made of, links lead somewhere, and blocks run."""
