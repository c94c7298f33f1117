"""What measures generated pictures: the judge of their captions, and the kernel distance to drawings."""
