"""One request to one chosen engine for each target."""
