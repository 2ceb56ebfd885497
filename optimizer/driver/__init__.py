"""One file for each command: optimize, verify, bench, opt, explain, bisect, doctor."""
