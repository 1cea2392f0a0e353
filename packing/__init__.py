"""Engines for a GPU machine without a network: packed here, unpacked there.

`python -m packing pack` downloads what the machine lacks and writes it as parts of a given size; `python -m packing
unpack` makes the engines' environments out of the parts. Unpacking needs the standard library alone. What is left out
(`packing.choices`) is what a Hopper GPU (H100, H200) does not load while it serves text.
"""
