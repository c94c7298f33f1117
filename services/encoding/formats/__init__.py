"""The three image formats, as far as they are read here: what a file says of itself, and its pixels without the rest.

Pillow decodes the pixels, but what it parses around them is refused for damage that no viewer minds, and in Python
costs seconds for a file of nothing but markers. So each format is walked here once, in time linear in its size, and
Pillow sees a file of the parts alone that make the picture.
"""
