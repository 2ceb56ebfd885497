"""Programs and graphs: structure, edits, reading and writing, verification. No policy."""
