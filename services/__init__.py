"""What each call computes: torch and numpy, never Ray and never gRPC."""
