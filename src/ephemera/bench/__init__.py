"""What `ephemera bench` and benchmarks/ share: prompts, contenders that take turns, the arithmetic's floor."""
