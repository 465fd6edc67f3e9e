"""Which output is which structure, under which names, and which case annotates what."""
