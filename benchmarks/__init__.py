"""One file per claim; each measures ours and its peers in one run and ends with one line of JSON."""
