"""What a pass and a backend implement: everything that third parties import."""
