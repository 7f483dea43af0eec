"""Every prompt of a file: read in windows, adapted in batches, written in order, resumed where it stopped."""
