"""Services of the operating system: resources, interrupts, atomic output, scratch folders, untrusted files."""
