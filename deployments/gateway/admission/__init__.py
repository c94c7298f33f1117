"""What is let in, how much of a stream is kept, and in which order it is answered."""
