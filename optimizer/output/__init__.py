"""Files of an output folder as records: manifest, lock, sites, report."""
