"""What `make bench` runs; each file prints one table and writes one JSON."""
