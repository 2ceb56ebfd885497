"""The machine and its files: resources, interrupts, atomic output, scratch folders, reading files of others."""
