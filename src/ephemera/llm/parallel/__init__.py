"""Models larger than one device: layers cut over processes (tensor), weights spread over them (fsdp), or kept elsewhere
until they are needed (offload). Each is a `FrozenLM` that gives the same results."""
