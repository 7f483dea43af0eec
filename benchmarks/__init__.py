"""Speed and memory of the adaptation, beside a peer and beside what the arithmetic allows."""
