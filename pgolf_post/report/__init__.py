"""One page to look at: runs, artifacts, sweeps and what is inside them, as a single HTML file that needs no network."""
